"""How a run begins or goes on: its folder is checked or made, and its decoder's files read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from hippocampus.backbones.architecture import architecture_text
from hippocampus.backbones.loading import load_backbone
from hippocampus.config import Config
from hippocampus.config_files import to_json, with_fields
from hippocampus.files import write_atomically
from hippocampus.models.halves import (
    backbone_path,
    backbone_record,
    check_backbone,
    read_backbone,
    read_frozen,
)
from hippocampus.runs.run_folder import RunFolder, environment
from hippocampus.training.console import RunConsole
from hippocampus.training.resume import check_resumable
from hippocampus.training.run_data import RunData
from hippocampus.training.state import TrainState


def open_folder(folder: RunFolder, config: Config, automatic: tuple[str, ...],
                allow_changes: Collection[str], data: RunData, console: RunConsole) -> None:
    """Checks that a run can go on, or begins one; config.json marks it and is written last.

    Args:
      folder: of the run.
      config, automatic: as resolved.
      allow_changes: see `hippocampus.training.loop.fit`.
      data: what is read.
      console: for what changes.

    Raises:
      ConfigError: a change that is not allowed.
      DataError, CheckpointError: a file of the run is damaged, or its decoder another one.
    """
    if folder.is_run():
        for line in check_resumable(folder, config, automatic, allow_changes):
            console.say(line)
        check_backbone(config, folder.backbone)
        changes = data.check_same_as(folder, allow_changes)
        for line in changes:
            console.say(line)
        if changes:
            data.save(folder)
    else:
        data.save(folder)
        if record := backbone_record(config):
            write_atomically(folder.backbone, record)
    write_atomically(folder.environment, json.dumps(environment(), indent=2) + "\n")
    write_atomically(folder.config, to_json(config, automatic))


def with_architecture(config: Config) -> Config:
    """The config with what the files of its pretrained decoder say of it, if it has one.

    Raises:
      ConfigError: the config names no decoder.
      DataError: it is not there, or not supported.
    """
    if not hasattr(config.model, "backbone"):
        return config
    found = load_backbone(backbone_path(config), weights=False)
    ends = found.tokenizer.end_ids if found.tokenizer else ()
    return with_fields(config, {
        "model.backbone.architecture": architecture_text(found.model.config),
        "model.backbone.end_ids": tuple(map(int, ends))})


def from_files(config: Config, model: Any, like: TrainState,
               make: Callable[[], TrainState], first: bool) -> TrainState:
    """A state with what is read from the files of the pretrained decoder, if there is one.

    Args:
      config, model: of the run.
      like: the state's abstract form.
      make: makes the rest of it.
      first: whether nothing is trained yet: a decoder that is trained whole begins as its files.

    Raises:
      DataError, CheckpointError: as `load_backbone`.
    """
    state = make()
    places = jax.tree.map(lambda leaf: leaf.sharding, (like.params, like.frozen))
    if like.frozen:
        return dataclasses.replace(state, frozen=read_frozen(model, config, places[1]))
    if not (first and hasattr(config.model, "backbone")):
        return state
    params = {**state.params, "backbone": read_backbone(config, "float32", places[0]["backbone"])}
    # A copy: the step donates its buffers, and no buffer may be donated twice.
    return dataclasses.replace(state, params=params, ema=jax.tree.map(
        jnp.copy, params) if config.ema.decay else {})
