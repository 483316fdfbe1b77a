"""A tiny pretrained decoder on disk, invented stories, and runs of a CHopT on both."""

import functools
import json
from pathlib import Path
from typing import Any

import story_files
import tiny_run

CHUNK = 64
TINY: dict[str, Any] = {
    **{name: value for name, value in tiny_run.TINY.items() if not name.startswith("model.")},
    "name": "tiny", "data.tokenizer": "backbone", "data.form": "stories", "data.context": 2 * CHUNK,
    "data.stories.template": "Q: {question}\nA: {answer}", "data.stories.story_weight": 0.5,
    "model.chunk": CHUNK, "model.memory.n_slots": 8, "model.memory.n_heads": 2,
    "model.memory.n_writes": 3, "model.memory.source_tokens": 2, "model.memory.steps": 1,
    "model.backbone.train": "lora", "model.lora.rank": 2, "train.batch_size": 4, "train.steps": 6,
    "eval.batch_size": 4, "eval.max_windows": 0, "eval.every_steps": 3, "log.every_steps": 1,
    "sample.prompt": "Q: ", "sample.max_new_tokens": 2}


@functools.cache
def decoder(seed: int = 0) -> Path:
    """A folder of the Hugging Face form: a random Llama of two layers that reads bytes."""
    import jax
    import numpy as np

    from hippocampus.backbones.architecture import Architecture, LayerSpec
    from hippocampus.backbones.hub_tokenizer import HubTokenizer
    from hippocampus.backbones.loading import Backbone, build_decoder, save_backbone
    from hippocampus.backbones.parameters import parameter_shapes
    from hippocampus.backbones.rotary import Rope
    from hippocampus.data.tokenizers import byte_tokenizer

    model = build_decoder(Architecture(
        "llama", 256, 16, 2, 1, 8, 2 * CHUNK, (LayerSpec(16, Rope(1e4)),) * 2, 1e-6, 8**-0.5))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: rng.normal(scale=0.2 if leaf.ndim > 1 else 1.0, size=leaf.shape).astype(
            np.float32), parameter_shapes(model))
    folder = tiny_run.folder() / f"decoder{seed}"
    # A text ends with a line: bytes have no other end.
    save_backbone(folder, Backbone(model, params, HubTokenizer(byte_tokenizer().to_json(), (10,))))
    return folder


@functools.cache
def stories() -> Path:
    """Six stories to train on and three to validate on."""
    folder = tiny_run.folder() / "stories"
    folder.mkdir()
    for split, first, n in (("train", 0, 6), ("val", 6, 3)):
        told = story_files.make_stories(n, first, sentences=2)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({
            "story": story.name, "sections": [story.text],
            "qa": [{"q": one.text, "a": list(one.answers), "kind": one.kind}
                   for one in story.questions]}) + "\n" for story in told))
    return folder


def config(**changes: Any) -> Any:
    """The tiny config; `train__steps=3` changes train.steps."""
    from hippocampus.config_files import defaults, load_config

    named = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(defaults("chopt"), {
        **TINY, "model.backbone.path": str(decoder()), "data.corpus": str(stories()), **named})
