"""Runs of a Buu on the tiny pretrained decoder of chopt_run, with plain text or its stories."""

from typing import Any

import chopt_run
import tiny_run

TINY: dict[str, Any] = {
    **{name: value for name, value in tiny_run.TINY.items() if not name.startswith("model.")},
    "name": "tiny", "data.tokenizer": "backbone", "data.context": 32, "data.documents": "packed",
    "model.adapters.count": 1, "model.adapters.ssm.expansion": 1.0,
    "model.adapters.memory.slots": 8, "model.adapters.memory.heads": 2,
    "model.adapters.memory.width": 8, "train.batch_size": 4, "train.steps": 6,
    "eval.batch_size": 4, "eval.every_steps": 3, "log.every_steps": 1,
    "sample.max_new_tokens": 2}
STORIES: dict[str, Any] = {
    "data.form": "stories", "data.documents": "joined", "data.context": 2 * chopt_run.CHUNK,
    "data.stories.template": "Q: {question}\nA: {answer}", "data.stories.story_weight": 0.5}
LORA: dict[str, Any] = {"model.adapters.count": 0, "model.backbone.train": "lora",
                        "model.lora.rank": 2}
"""The control: low-rank adapters, and no others."""


def config(base: dict[str, Any] | None = None, **changes: Any) -> Any:
    """The tiny config, with `STORIES` or `LORA`; `train__steps=3` changes train.steps."""
    from hippocampus.config_files import defaults, load_config

    base = base or {}
    named = {name.replace("__", "."): value for name, value in changes.items()}
    corpus = chopt_run.stories() if base.get("data.form") == "stories" else tiny_run.corpus()
    return load_config(defaults("buu"), {
        **TINY, "model.backbone.path": str(chopt_run.decoder()), "data.corpus": str(corpus),
        **base, **named})
