"""A run on a synthetic task that trains in seconds, and that only one of its paths can solve."""

import functools
from pathlib import Path
from typing import Any

import tiny_run

COPY: dict[str, Any] = {
    "data__corpus": "recall:delayed_copy", "data__tokenizer": "ids", "data__documents": "packed",
    "data__context": 12, "data__recall__vocab_size": 16, "data__recall__lengths": (6,),
    "data__recall__pairs": (1,), "data__recall__examples": (3000,),
    "data__recall__test_lengths": (6, 12, 24), "data__recall__test_pairs": (1, 1, 1),
    "data__recall__test_examples": 60, "sample__prompt": "5 0 0 0 1",
    "sample__max_new_tokens": 1, "train__steps": 100, "train__batch_size": 32,
    "eval__every_steps": 50, "optimizer__warmup_steps": 10,
    "model__paths": ("hopfield", "attention"), "model__hopfield__patterns": "slots",
    "model__hopfield__n_slots": 4, "model__hopfield__depth_schedule": (1,)}
"""One id, filler, then a mark at which it is asked for; slots know nothing of the context."""


def config(**changes: Any) -> Any:
    """The config of the run, with changes."""
    return tiny_run.config(**{**COPY, **changes})


@functools.cache
def trained() -> Path:
    """The finished run."""
    from hippocampus.training.loop import fit

    return fit(config(), tiny_run.folder() / "copy")
