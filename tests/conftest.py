"""What several test folders share: the `--full` lane and the data that may be absent."""

import functools
import gc
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import full_only
import long_files
import pytest
import quick_xla

from hippocampus import xla_flags

TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    # A shell starts its background jobs with Ctrl-C ignored, and their children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("JAX_PLATFORMS") == "cpu" and not config.getoption("--full"):
        xla_flags.prepare(*quick_xla.FLAGS)


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    """What has been collected lives to the end: the garbage collector need not look at it again."""
    gc.disable()
    yield
    gc.freeze()
    # Traces of programs are made of many small objects, of which few are ever garbage.
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(config, items):
    places = {TESTS / file: n for n, file in enumerate(long_files.FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if not config.getoption("--full"):
        for item in items:
            if item.get_closest_marker("full") or full_only.is_full_only(
                    *full_only.parts(item.nodeid)):
                item.add_marker(pytest.mark.skip(reason="slow: runs with --full"))


@pytest.fixture(scope="session", autouse=True)
def no_lines_of_code_in_programs():
    """As in a run; a twentieth of the time, most of which goes into making programs."""
    xla_flags.python_calls(0)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tokenizers, shards and compiled programs of tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HIPPOCAMPUS_COMPILATION_CACHE", "off")
        yield


@pytest.fixture(scope="session")
def tinyshakespeare_path() -> Path:
    default = TESTS.parent / "../shared/data"
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
def random_parameters() -> Callable[..., Any]:
    """A function model -> parameters drawn at random: what starts at zero would hide what it does.

    Made without compiling the model's own initialisation, of about its size.
    """
    import numpy as np

    from hippocampus.models.build_model import parameter_shapes

    def draw(path: tuple, leaf: Any, rng: np.random.Generator) -> np.ndarray:
        name, noise = path[-1].key, rng.normal(size=leaf.shape)
        if name in ("kernel", "embedding", "head", "output_kernel"):
            fan_in = leaf.shape[0 if name == "kernel" and len(leaf.shape) == 2 else -1]
            noise = noise * fan_in**-0.5
        elif name in ("scale", "skip", "input_scale", "input_kernel"):
            noise = 1 + 0.1 * noise
        elif name == "log_decay":
            noise = rng.uniform(-5, -1, leaf.shape)
        elif name not in ("slots", "time_kernel"):
            noise = 0.3 * noise
        return noise.astype(leaf.dtype)

    def make(model: Any, seed: int = 0) -> Any:
        import jax

        rng = np.random.default_rng(seed)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.numpy.asarray(draw(path, leaf, rng)), parameter_shapes(model))

    return make


@pytest.fixture(scope="session")
def built(tiny_config, random_parameters):
    """overrides -> (model, random parameters); the same overrides give the same objects."""
    from hippocampus.models.build_model import build_model

    @functools.cache
    def make(items):
        model = build_model(tiny_config(dict(items)))
        return model, random_parameters(model)

    return lambda overrides=None: make(tuple((overrides or {}).items()))


@pytest.fixture(scope="session")
def built_equilibrium(random_parameters):
    """overrides -> (equilibrium model, random parameters); equal overrides give equal objects.

    One Mamba layer, all parts of the cell, patterns of both kinds; `progress` in [0, 1] makes 2 to
    30 sweeps.
    """
    from hippocampus.config_files import defaults, load_config
    from hippocampus.models.build_model import build_model

    @functools.cache
    def make(items):
        tiny = {
            "data.context": 24, "model.vocab_size": 31, "model.d_model": 16, "model.n_layers": 1,
            "model.n_heads": 2, "model.compute_dtype": "float32", "model.ssm.d_state": 4,
            "model.hopfield.n_slots": 5, "model.hopfield.patterns": "both",
            "model.cell.mlp.width": 16, "model.solver.tol_fixedpoint": 1e-5,
            "model.solver.ramp_fraction": 1.0, "model.solver.ramp_tol": 1.0}
        model = build_model(load_config(defaults("equilibrium"), {**tiny, **dict(items)}))
        return model, random_parameters(model)

    return lambda overrides=None: make(tuple((overrides or {}).items()))


@pytest.fixture(scope="module")
def quick_compiles(request):
    """Compiles with few optimisations, in half the time; as usual with --full."""
    import jax

    jax.config.update("jax_disable_most_optimizations", not request.config.getoption("--full"))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
