"""What no single field of a config can be checked for: `check_together`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from hippocampus.config import (
    MESH_AXES,
    RECALL_TASKS,
    TOKENIZERS,
    Config,
    DataConfig,
    OptimizerConfig,
    StoriesConfig,
)
from hippocampus.config_checks_buu import check_buu
from hippocampus.config_checks_chopt import check_chopt
from hippocampus.config_checks_decoder import BACKBONE
from hippocampus.config_checks_equilibrium import check_equilibrium
from hippocampus.config_checks_hybrid import check_hybrid
from hippocampus.config_recall import RECALL, check_recall
from hippocampus.config_refusals import check_divides, pattern_error, shown
from hippocampus.errors import ConfigError
from hippocampus.files import check_nameable

_LONGEST_NAME = 255
"""Bytes of a file's name."""

_FAMILIES: dict[str, Callable[[Config, Any], None]] = {
    "hybrid": check_hybrid, "equilibrium": check_equilibrium, "chopt": check_chopt,
    "buu": check_buu}


def check_together(config: Config) -> Config:
    """Checks what no single field can be checked for; returns the same config.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    train, model = config.train, config.model
    _check_name(config.name)
    check_divides("train.batch_size", train.batch_size,
                  "train.grad_accumulation", train.grad_accumulation)
    _check_groups(config.optimizer)
    if not hasattr(model, "backbone"):  # of which the decoder's files say the widths
        check_divides("model.d_model", model.d_model, "model.n_heads", model.n_heads)
    _FAMILIES[model.family](config, model)
    _check_data(config.data)
    _check_stories(config)
    if not config.sample.prompt:
        raise ConfigError("sample.prompt is empty", "give at least one character")
    for pattern, axes in config.mesh.rules:
        for part in axes.split(","):
            named = [axis.strip() for axis in part.split("+") if axis.strip() != "-"]
            if (unknown := set(named) - set(MESH_AXES)) or len(set(named)) < len(named):
                wrong = f"the axis {shown(sorted(unknown)[0])}" if unknown else "an axis twice"
                raise ConfigError(f"mesh.rules names {wrong} for {shown(pattern)}",
                                  f"known: {', '.join(MESH_AXES)}, -; each once in a dimension")
    check_divides("data.context", config.data.context, "mesh.sequence", config.mesh.sequence)
    context = config.eval.context or config.data.context
    if config.eval.stride > context:
        raise ConfigError(f"eval.stride = {config.eval.stride} is more than the evaluation's "
                          f"context of {context}", "tokens would be left out; 0 = disjoint windows")
    longest = model.longest_row(config.data.context)
    if longest is not None and context > longest:
        raise ConfigError(f"eval.context = {context} is more than the learned positions, "
                          f"{longest}", "raise model.max_length, or take model.position=rope")
    return config


def _check_groups(optimizer: OptimizerConfig) -> None:
    """Refuses rates and decays of `optimizer.groups` that no update can have."""
    for pattern, scale, decay in optimizer.groups:
        for what, value in (("learning_rate_scale", scale), ("weight_decay", decay)):
            if not 0 <= value <= 100:
                raise ConfigError(f"optimizer.groups has {what} = {value:g} for {shown(pattern)}",
                                  "it must be at least 0 and at most 100")


def _check_name(name: str) -> None:
    """Refuses what is no plain name of a folder."""
    plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\")
    if not name or name in (".", "..") or not plain or len(name.encode()) > _LONGEST_NAME:
        raise ConfigError(f"name is {shown(name)}", "use a plain folder name")


def _check_data(data: DataConfig) -> None:
    """Refuses fields of `data` that contradict each other."""
    for field in ("corpus", "tokenizer", "validation_files", "test_files"):
        check_nameable(getattr(data, field), f"data.{field}:")
    is_path = "/" in data.tokenizer or data.tokenizer.endswith(".json")
    if data.tokenizer not in TOKENIZERS and not is_path:
        near = difflib.get_close_matches(data.tokenizer, TOKENIZERS, n=1)
        raise ConfigError(f"data.tokenizer is {shown(data.tokenizer)}; it must be one of "
                          f"{', '.join(TOKENIZERS)}, or the path of a tokenizer.json",
                          f"did you mean {near[0]}?" if near else "a path has a / or ends in .json")
    if data.vocab_size and data.tokenizer not in ("bpe", "words"):
        kind = data.tokenizer if data.tokenizer in TOKENIZERS else shown(data.tokenizer)
        raise ConfigError(f"data.vocab_size = {data.vocab_size} has no meaning for "
                          f"data.tokenizer = {kind}",
                          "only bpe and words have a choice")
    smallest = {"bpe": 257, "words": 3}.get(data.tokenizer, 0)
    if 0 < data.vocab_size < smallest:
        raise ConfigError(f"data.vocab_size = {data.vocab_size} is less than {smallest}",
                          f"{data.tokenizer} needs {smallest - 1} ids before the first word")
    if error := pattern_error(data.document_start):
        raise ConfigError(f"data.document_start is not a regular expression: {error}",
                          "WikiText's articles begin with '^ = [^=].* = $'")
    if data.test_files and not data.validation_files:
        raise ConfigError("data.test_files is set without data.validation_files",
                          "name the files to validate on too")
    if data.corpus.startswith(RECALL):
        check_recall(data)
    elif data.tokenizer == "ids":
        raise ConfigError("data.tokenizer is ids, and data.corpus a text",
                          f"ids are for data.corpus={RECALL}{RECALL_TASKS[0]} and the like")


def _check_stories(config: Config) -> None:
    """Refuses stories for a model without a pretrained decoder, and settings that have none."""
    data, family = config.data, config.model.family
    if data.tokenizer == BACKBONE and not hasattr(config.model, "backbone"):
        raise ConfigError(f"data.tokenizer is {BACKBONE}, and model.family {family} has no "
                          "pretrained decoder", "bytes, characters, words, bpe or a path")
    if data.form == "text":
        if data.stories != StoriesConfig():
            raise ConfigError("data.stories is set, and data.form is text",
                              "data.form=stories reads stories with questions")
        return
    if not hasattr(config.model, "backbone"):
        raise ConfigError(f"data.form is stories, and model.family {family} has no pretrained "
                          "decoder", "model.family=chopt and buu have one; data.form=text reads "
                          "documents")
    if data.order != "shuffled" or data.documents != "joined" or config.eval.stride:
        raise ConfigError("data.order, data.documents or eval.stride is set, and data.form is "
                          "stories", "stories have an order of their own: leave them out")
    before, name, behind = data.stories.template.partition("{question}")
    if not name or "{answer}" not in behind or "{answer}" in before:
        raise ConfigError(f"data.stories.template is {shown(data.stories.template)}",
                          "it needs {question} and, behind it, {answer}, once each")
