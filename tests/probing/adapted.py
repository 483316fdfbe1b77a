"""A tiny Buu of bytes with adapters that do something, drawn at random."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hippocampus.backbones.loading import load_backbone
from hippocampus.config import BuuConfig, Config
from hippocampus.config_adapters import AdaptersConfig, SlotMemoryConfig
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.build_model import parameter_shapes
from hippocampus.models.buu import Buu

LLAMA = Path(__file__).resolve().parents[1] / "backbones" / "fixtures" / "llama"
CONTEXT, SLOTS = 32, 8


@functools.cache
def model(**changes: Any) -> Buu:
    """Two layers, both with an adapter of eight slots."""
    config = dataclasses.replace(load_backbone(LLAMA, weights=False).model.config, vocab_size=256)
    config = dataclasses.replace(config, layers=config.layers[:2])
    plain = AdaptersConfig()
    return Buu(config, dataclasses.replace(
        plain, count=len(config.layers),
        ssm=dataclasses.replace(plain.ssm, backend="associative"),
        memory=SlotMemoryConfig(slots=SLOTS, heads=1), **changes))


@functools.cache
def _drawn(own: Buu) -> Any:
    rng = np.random.default_rng(0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (0.3 * rng.normal(size=leaf.shape) + (
            path[-1].key in ("scale", "residual_scale"))).astype(leaf.dtype), parameter_shapes(own))
    return params


def adapted(**changes: Any) -> LanguageModel:
    """The model with a tree of its own, whose arrays may be written to."""
    own = model(**changes)
    config: Any = Config()
    config = dataclasses.replace(config, model=BuuConfig(), data=dataclasses.replace(
        config.data, context=CONTEXT))
    return LanguageModel(own, jax.tree.map(np.array, _drawn(own)), byte_tokenizer(), config, 7)
