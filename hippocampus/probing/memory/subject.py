"""A model that is asked about stories, and how much it is asked: `Subject`, `Settings`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
import xxhash
from jaxtyping import Bool, Int32

from hippocampus.config_memory import check_memory
from hippocampus.data.story_forms import Story
from hippocampus.data.story_tokens import Template, tokenize_story
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.errors import ConfigError
from hippocampus.generation.memory_file import Fingerprint
from hippocampus.layers.memory_bank import MemoryBank
from hippocampus.models.chopt import CHopT
from hippocampus.ops.memory_state import MemoryState

LAYER = "memory_bank"
"""Name of the layer in fingerprints, as among the parameters."""


@dataclass(frozen=True)
class Settings:
    """How much is written and asked.

    Attributes:
      stories: that are asked about at most, evenly spaced over the split; 0 = all.
      questions: about each at most, evenly spaced; 0 = all.
      answer_tokens: that are written at most.
      context_tokens: in front of an answer at most, where a text stands there (story, snippet);
        never more than the decoder was trained for.
      passage_words: of a passage that BM25 looks up.
      delays: rows of other stories, one each, that are read between a story and its questions.
      interferers: whole stories that are read between.
      slots: of smaller or larger memories; () = an eighth, a quarter and a half of the model's.
      users: memories that are written at once.
      rows: questions that are asked at once.
    """

    stories: int = 32
    questions: int = 4
    answer_tokens: int = 24
    context_tokens: int = 2048
    passage_words: int = 60
    delays: tuple[int, ...] = (1, 4, 16)
    interferers: tuple[int, ...] = (1, 2, 4, 8)
    slots: tuple[int, ...] = ()
    users: int = 8
    rows: int = 16

    def __post_init__(self) -> None:
        for name, least in (("stories", 0), ("questions", 0), ("answer_tokens", 1),
                            ("context_tokens", 1), ("passage_words", 1), ("users", 1),
                            ("rows", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}",
                                  f"it must be at least {least}")
        for name in ("delays", "interferers", "slots"):
            if any(amount < 1 for amount in getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)}", "each must be at least 1")


@dataclass(frozen=True)
class Point:
    """After what a memory is asked.

    Attributes:
      kind: "story" (it has just read it), "delay", "interference" or "slots".
      amount: rows, stories or slots; 0 for "story".
    """

    kind: str = "story"
    amount: int = 0

    @property
    def name(self) -> str:
        """Of a folder of memories, and of a row in a table."""
        return f"{self.kind}_{self.amount}" if self.amount else self.kind


STORY = Point()
"""Nothing between the story and the questions, in as many slots as the model has."""


@dataclass(frozen=True, eq=False)
class Subject:
    """All that writing and asking need of a model.

    Attributes:
      model, params: of the family; parameters lie as `backbone` and `memory_bank`.
      tokenizer: of stories, questions and answers.
      template: how questions are put.
      context: tokens of a row that is written, `begin_id` included, as in training.
      begin_id: in front of every row and prompt; None = nothing.
      end_id: that ends an answer; None = none does.
      sharding: of rows and memories along their first axis, the user; None = one device.
    """

    model: CHopT
    params: Any = field(repr=False)
    tokenizer: Tokenizer
    template: Template
    context: int
    begin_id: int | None = None
    end_id: int | None = None
    sharding: jax.sharding.Sharding | None = None

    @cached_property
    def reader(self) -> CHopT:
        """The model that reads a row as one chunk: a prompt is never cut."""
        return self.model.clone(chunk=0)

    @cached_property
    def begin(self) -> Int32[np.ndarray, " b"]:
        """What every row and prompt begins with."""
        return np.array([] if self.begin_id is None else [self.begin_id], np.int32)

    @cached_property
    def digest(self) -> str:
        """Of every parameter."""
        digest = xxhash.xxh3_128()
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            array = np.asarray(jax.device_get(leaf))
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()

    @property
    def gate(self) -> float:
        """tanh(a), by which what is read is multiplied: 0 = the memory is shut."""
        return float(np.tanh(np.float32(self.params[LAYER]["read_gate"])))

    def fingerprint(self) -> Fingerprint:
        """Whose the memory files are."""
        memory, D = self.model.memory, self.model.config.d_model
        return Fingerprint(self.digest, LAYER, D, memory.n_slots, memory.n_heads,
                           (memory.width or D) // memory.n_heads, self.tokenizer.digest)

    def with_slots(self, n_slots: int) -> Subject:
        """The same parameters with memories of another size.

        Raises:
          ConfigError: the first memory is learned, slot by slot, or a chunk writes more than that.
        """
        memory = dataclasses.replace(self.model.memory, n_slots=n_slots)
        if memory.initial == "learned" and n_slots != self.model.memory.n_slots:
            raise ConfigError("the slots of a new memory are learned: it has as many as it has",
                              "leave out other numbers of slots")
        check_memory(memory, self.model.config.d_model)
        other = dataclasses.replace(self, model=self.model.clone(memory=memory))
        if "digest" in self.__dict__:  # of hundreds of megabytes
            other.__dict__["digest"] = self.digest
        return other

    def at(self, point: Point) -> Subject:
        """With the memories of a point of the curves."""
        return self.with_slots(point.amount) if point.kind == "slots" else self

    def new_memories(self, users: int) -> MemoryState:
        """The memories of new users, as numpy arrays."""
        cfg = self.model.config
        bank = MemoryBank(self.model.memory, cfg.d_model, cfg.norm_epsilon)
        found: Any = bank.apply({"params": self.params[LAYER]}, users, method="init_state")
        state: MemoryState = jax.device_get(found)
        return state

    def rows(self, story: Story) -> tuple[Int32[np.ndarray, "n T"], Bool[np.ndarray, "n T"]]:
        """A story as it is read in training: rows of ids, and which of them are no padding."""
        cut = tokenize_story(story, self.tokenizer, self.context - len(self.begin))
        front = np.broadcast_to(self.begin, (len(cut.ids_CT), len(self.begin)))
        return (np.concatenate((front, cut.ids_CT), axis=1).astype(np.int32),
                np.concatenate((np.ones(front.shape, bool), cut.valid_CT), axis=1))

    def place(self, tree: Any) -> Any:
        """Puts arrays whose first axis is the user's where they belong."""
        return tree if self.sharding is None else jax.device_put(tree, self.sharding)


def points(subject: Subject, settings: Settings, stories: int) -> tuple[tuple[Point, ...],
                                                                        tuple[str, ...]]:
    """The points of all curves that there can be, and why others are left out.

    Args:
      subject: the model.
      settings: what is asked for.
      stories: how many there are.
    """
    memory, notes = subject.model.memory, []
    found = [STORY, *(Point("delay", n) for n in sorted(set(settings.delays)))]
    few = [n for n in sorted(set(settings.interferers)) if n < stories]
    if len(few) < len(set(settings.interferers)):
        notes.append(f"no more than {stories - 1} stories interfere: there are {stories}")
    found += [Point("interference", n) for n in few]
    wanted = settings.slots or tuple(memory.n_slots // part for part in (8, 4, 2))
    if memory.initial == "learned":
        notes.append("no curve over slots: those of a new memory are learned one by one")
        return tuple(found), tuple(notes)
    least = memory.n_writes
    sizes = sorted({n for n in wanted if n >= max(least, 1) and n != memory.n_slots})
    if settings.slots and any(n < least for n in settings.slots):
        notes.append(f"no memory has fewer than {least} slots: a chunk writes as many")
    return (*found, *(Point("slots", n) for n in sizes)), tuple(notes)
