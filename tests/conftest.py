"""What several test folders share: the `--full` lane and the data that may be absent."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(pytest.mark.skip(reason="slow: runs with --full"))


@pytest.fixture(scope="session")
def tinyshakespeare_path() -> Path:
    default = Path(__file__).resolve().parents[1] / "../shared/data"
    path = Path(os.environ.get("HIPPOCAMPUS_DATA") or default) / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip(f"no {path.name} in $HIPPOCAMPUS_DATA or ../shared/data")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """A factory: overrides by dotted name -> the Config of a model that compiles in a second.

    31 ids, so that the padding of the tables matters; all paths in two equal layers.
    """
    from hippocampus.config_files import defaults, load_config

    def make(overrides: Mapping[str, Any] | None = None) -> Any:
        tiny = {
            "data.context": 24, "model.vocab_size": 31, "model.d_model": 16, "model.n_layers": 2,
            "model.n_heads": 2, "model.compute_dtype": "float32", "model.mixer.width": 8,
            "model.hopfield.depth_schedule": (2,), "model.hopfield.n_slots": 5,
            "model.segments.controller_width": 8, "model.mlp.width": 16}
        return load_config(defaults("hybrid"), {**tiny, **(overrides or {})})

    return make


@pytest.fixture(scope="session")
def randomized() -> Callable[[Any], Any]:
    """A function params -> params + noise: what starts at zero would hide what it does."""
    import jax

    def shake(params: Any, size: float = 0.1, seed: int = 0) -> Any:
        leaves, form = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        return jax.tree.unflatten(form, [
            leaf + size * jax.random.normal(key, leaf.shape, leaf.dtype)
            for leaf, key in zip(leaves, keys, strict=True)])

    return jax.jit(shake, static_argnames=("size", "seed"))
