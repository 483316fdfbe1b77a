"""What no single field of a config can be checked for: `check_together`."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from hippocampus.config import (
    MESH_AXES,
    PATHS,
    RECALL_TASKS,
    TOKENIZERS,
    Config,
    DataConfig,
    layer_paths,
)
from hippocampus.config_recall import RECALL, check_recall
from hippocampus.errors import ConfigError
from hippocampus.files import check_nameable

_LONGEST_NAME = 255
"""Bytes of a file's name."""


def shown(value: Any) -> str:
    """`repr(value)` for a message: on one line, and cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except Exception:  # an integer of more digits than Python prints, or anybody's own __repr__
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= 100 else f"{text[:60]}… ({len(text):,} characters)"


def pattern_error(pattern: str) -> str:
    """What is wrong with a regular expression; "" for a good one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def check_text(field: str, value: str) -> None:
    """Refuses what no file of text can hold, and what none should.

    Raises:
      ConfigError: naming the field; a password is not shown.
    """
    try:
        value.encode("utf-8")
        what = "the character NUL" if "\0" in value else ""
    except UnicodeEncodeError:
        what = "half a surrogate pair"
    if re.search(r"\w://[^/\s@]+@", value):  # config.json is made to be shared
        raise ConfigError(f"{field} is an address with a user name or password in it",
                          "leave them out; a token belongs into the environment")
    if what:
        raise ConfigError(f"{field} is {shown(value)}; it holds {what}", "give it as plain text")


def check_together(config: Config) -> Config:
    """Checks what no single field can be checked for; returns the same config.

    Raises:
      ConfigError: with the fields and the numbers that do not fit.
    """
    train, model = config.train, config.model

    def divides(name: str, size: int, by_name: str, by: int) -> None:
        if size % by:
            near = max(by, size - size % by)
            raise ConfigError(f"{name} = {size} is not a multiple of {by_name} = {by}",
                              f"the nearest multiple is {near}")

    _check_name(config.name)
    divides("train.batch_size", train.batch_size,
            "train.grad_accumulation", train.grad_accumulation)
    divides("model.d_model", model.d_model, "model.n_heads", model.n_heads)
    if not model.paths or len(set(model.paths)) != len(model.paths):
        raise ConfigError(f"model.paths is {shown(model.paths)}",
                          f"name each of {', '.join(PATHS)} once")
    used = {path for paths in layer_paths(model) for path in paths}
    if "attention" in used and model.attention.n_kv_heads:
        divides("model.n_heads", model.n_heads, "model.attention.n_kv_heads",
                model.attention.n_kv_heads)
    rotary = ("attention" in used and model.position == "rope") or (
        "hopfield" in used and model.hopfield.rope)
    if rotary and model.d_model // model.n_heads % 2:
        raise ConfigError(f"rotary positions need an even head width, not model.d_model / "
                          f"model.n_heads = {model.d_model // model.n_heads}",
                          "change model.n_heads, or take model.position=learned")
    if "ssm" in used:
        inner = model.ssm.expansion * model.d_model
        if not math.isclose(inner, round(inner)):
            raise ConfigError(f"model.ssm.expansion * model.d_model = {inner:g} is not whole",
                              "choose an expansion such as 1, 1.5 or 2")
        divides("model.ssm.expansion * model.d_model", round(inner), "model.n_heads", model.n_heads)
    if not model.hopfield.depth_schedule:
        raise ConfigError("model.hopfield.depth_schedule is empty", "give at least one number")
    if model.segments.train > 1 and model.segments.eval < model.segments.train:
        raise ConfigError(f"model.segments.eval = {model.segments.eval} is less than "
                          f"model.segments.train = {model.segments.train}",
                          "evaluation needs at least the passes of training")
    if not model.segments.weights or model.segments.weights[-1] <= 0:
        raise ConfigError("the last of model.segments.weights must be above 0",
                          "the last pass is the one that predicts")
    if config.loss.rectified_flow.segment_weight and model.segments.train < 2:
        raise ConfigError("loss.rectified_flow.segment_weight needs model.segments.train of at "
                          "least 2", "it is the flow from the first pass to the last")
    _check_data(config.data)
    if not config.sample.prompt:
        raise ConfigError("sample.prompt is empty", "give at least one character")
    for pattern, axes in config.mesh.rules:
        named = [axis.strip() for part in axes.split(",") for axis in part.split("+")
                 if axis.strip() != "-"]
        if (unknown := set(named) - set(MESH_AXES)) or len(set(named)) < len(named):
            wrong = f"the axis {shown(sorted(unknown)[0])}" if unknown else "an axis twice"
            raise ConfigError(f"mesh.rules names {wrong} for {shown(pattern)}",
                              f"known: {', '.join(MESH_AXES)}, -; each once")
    divides("data.context", config.data.context, "mesh.sequence", config.mesh.sequence)
    if model.position == "learned" and 0 < model.max_length < config.data.context:
        raise ConfigError(f"model.max_length = {model.max_length} is less than data.context = "
                          f"{config.data.context}", "learned positions need a row per token")
    context = config.eval.context or config.data.context
    if config.eval.stride > context:
        raise ConfigError(f"eval.stride = {config.eval.stride} is more than the evaluation's "
                          f"context of {context}", "tokens would be left out; 0 = disjoint windows")
    if model.position == "learned" and context > (model.max_length or config.data.context):
        raise ConfigError(f"eval.context = {context} is more than the learned positions, "
                          f"{model.max_length or config.data.context}",
                          "raise model.max_length, or take model.position=rope")
    return config


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
