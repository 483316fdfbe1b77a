"""From a run folder to a model that is asked about stories, in one process or in two.

The process that writes reads the stories and ends; the one that asks starts with the files.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from hippocampus.config import CHopTConfig
from hippocampus.data.stories import open_stories
from hippocampus.data.story_forms import Story
from hippocampus.data.story_tokens import Template
from hippocampus.errors import ConfigError, DataError
from hippocampus.evaluation.result_table import Protocol
from hippocampus.evaluation.stand_alone import load_weights, open_folder
from hippocampus.exports.folder import is_export
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.memory_file import load_memory
from hippocampus.probing.memory.study import choose_questions, choose_stories
from hippocampus.probing.memory.subject import STORY, Settings, Subject
from hippocampus.probing.memory.writing import memory_path

USERS = "users"
"""Axis of a mesh over which users are dealt."""


@dataclass(frozen=True)
class Request:
    """Which stories, and how the two processes share the work.

    Attributes:
      stories: a source of `hippocampus.data.stories`; "" = the run's own `data.corpus`.
      split: of it.
      memories: folder of the memory files; "" = one that is removed afterwards.
      stage: "all" (another process writes, this one asks), "write" or "ask".
      seed, step, weights, context: as of `open_probe`.
      settings: how much is written and asked.
    """

    stories: str = ""
    split: str = "validation"
    memories: str = ""
    stage: str = "all"
    seed: int = 0
    step: int | None = None
    weights: str | None = None
    context: int | None = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"--seed is {self.seed}", "it must be at least 0")
        if self.stage != "all" and not self.memories:
            raise ConfigError(f"--stage={self.stage} needs the folder of the memories",
                              "--memories=DIR")


@dataclass(frozen=True, eq=False)
class StoryProbe:
    """A model beside stories.

    Attributes:
      run: the folder that the model is of.
      lm: the model with its parameters, tokenizer and config.
      subject: the same, as it is asked.
      stories: that it is asked about.
      protocol: how.
      settings: how much.
      memories: folder of the memory files.
      seed: of what is drawn.
    """

    run: Path
    lm: LanguageModel
    subject: Subject
    stories: tuple[Story, ...]
    protocol: Protocol
    settings: Settings
    memories: Path
    seed: int = 0

    @property
    def config(self) -> Any:
        """Of the run."""
        return self.lm.config


def settings_of(lm: LanguageModel, context: int | None = None) -> Subject:
    """What a run says of how its model reads stories and is asked.

    Args:
      lm: of the family chopt.
      context: tokens of a row; None = the run's own, after which the memory is written.
    """
    config, tokenizer = lm.config, lm.tokenizer
    assert isinstance(config.model, CHopTConfig)
    return Subject(lm.model, lm.params, tokenizer, Template(config.data.stories.template),
                   context or config.model.chunk or config.data.context,
                   getattr(tokenizer, "begin_id", None), next(iter(tokenizer.end_ids), None))


def open_story_probe(workdir: str | Path, request: Request, memories: Path) -> StoryProbe:
    """Opens a run folder, or an exported one, beside stories.

    Args:
      workdir: the folder.
      request: which stories and how much.
      memories: folder of the memory files.

    Raises:
      ConfigError: a setting that does not go with the run.
      DataError: no run folder, or no such stories.
      CheckpointError: no such step, or a damaged one.
    """
    folder, config = open_folder(workdir)
    average = "both" if is_export(folder.path) else "ema" if config.ema.decay else "raw"
    mesh = jax.make_mesh((jax.local_device_count(),), (USERS,), devices=jax.local_devices(),
                         axis_types=(jax.sharding.AxisType.Auto,))
    several = mesh.size > 1
    (weights, lm), = load_weights(
        folder, request.weights or average, request.step,
        NamedSharding(mesh, PartitionSpec()) if several else None).items()
    subject, settings = settings_of(lm, request.context), request.settings
    if several:
        subject, settings = spread(subject, settings, mesh)
    source = open_stories(request.stories or config.data.corpus, text=config.data.stories.text)
    stories = choose_stories(tuple(source.read(request.split)), settings.stories)
    asked = choose_questions(subject, stories, settings.questions)
    tokens = sum(len(one.ids.answers[0]) for one in asked)
    tokenizer = lm.tokenizer
    protocol = Protocol(
        source.name, source.digest, request.split, tokens, tokenizer.kind, tokenizer.digest,
        tokenizer.vocab_size, subject.context, subject.context, "packed", weights, lm.step)
    return StoryProbe(folder.path, lm, subject, stories, protocol, settings, memories,
                      request.seed)


def spread(subject: Subject, settings: Settings,
           mesh: jax.sharding.Mesh) -> tuple[Subject, Settings]:
    """Users dealt over the devices of a mesh, as many to each.

    Args:
      subject: whose parameters lie on every device.
      settings: whose numbers at once are rounded up.
      mesh: with the axis `USERS`.
    """
    def rounded(n: int) -> int:
        return -(-n // mesh.size) * mesh.size

    return (dataclasses.replace(subject, sharding=NamedSharding(mesh, PartitionSpec(USERS))),
            dataclasses.replace(settings, users=rounded(settings.users),
                                rows=rounded(settings.rows)))


def write_in_another_process(workdir: str | Path, request: Request, folder: Path) -> Request:
    """Starts the verb once more to write the memories, and waits until that process has ended.

    Call it before anything touches a device: an accelerator belongs to one process.

    Args:
      workdir: the run folder.
      request: what is asked for.
      folder: of the memory files.

    Returns:
      The request with the step that was written from.

    Raises:
      HippocampusError: it did not end well; what it says of it stands on the console.
    """
    command = [sys.executable, "-m", "hippocampus.probe", f"--workdir={workdir}",
               *flags_of(request, folder)]
    code = subprocess.run(command, check=False).returncode
    if code:
        kind = ConfigError if code == ConfigError.exit_code else DataError
        raise kind(f"the process that writes the memories ended with {code}",
                   "what it said stands above")
    step = load_memory(memory_path(folder, STORY, 0)).notes.get("step", "")
    if request.step is not None or not step:
        return request
    return dataclasses.replace(request, step=int(step))


def flags_of(request: Request, folder: Path) -> list[str]:
    """The flags of `python -m hippocampus.probe` that write the memories of a request."""
    s = request.settings
    values: Mapping[str, Any] = {
        "suite": "memory", "stage": "write", "memories": folder, "stories": request.stories,
        "split": request.split, "seed": request.seed, "step": request.step,
        "weights": request.weights, "context": request.context, "max_stories": s.stories,
        "max_questions": s.questions, "delays": _listed(s.delays),
        "interferers": _listed(s.interferers), "slots": _listed(s.slots), "users": s.users}
    # An empty list is said too: left out, it would be the default.
    return [f"--{name}={value}" for name, value in values.items()
            if value is not None and (value != "" or name in ("delays", "interferers"))]


def _listed(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))
