"""The names that users and other people's tools hold on to."""

import ast
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

import hippocampus as hp

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("train", "sample")


def import_everything() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(hp.__path__, "hippocampus.")]
    for name in names:
        importlib.import_module(name)
    return names


def parameters(function: typing.Callable) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_every_public_name_is_itself_after_importing_every_submodule():
    assert len(import_everything()) > 40
    from hippocampus.config import Config
    from hippocampus.config_files import load_config
    from hippocampus.errors import HippocampusError
    from hippocampus.generation.language_model import LanguageModel
    from hippocampus.generation.loading import load
    from hippocampus.models.build_model import build_model
    from hippocampus.training.loop import fit

    documented = {"Config": Config, "load_config": load_config, "LanguageModel": LanguageModel,
                  "HippocampusError": HippocampusError, "load": load, "build_model": build_model,
                  "fit": fit}
    for name, value in documented.items():
        # A submodule of the same name would have taken its place (hp.train is the module).
        assert getattr(hp, name) is value, name
        assert name in hp.__all__ and name in dir(hp)
    assert set(hp.__all__) == {*documented, "__version__"}
    assert isinstance(hp.__version__, str)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_modules_with_a_main(verb):
    import_everything()
    module = getattr(hp, verb)
    assert isinstance(module, types.ModuleType) and callable(module.main)
    assert f"python -m hippocampus.{verb}" in (module.__doc__ or "")


def test_load_config_takes_a_source_and_overrides():
    arguments = parameters(hp.load_config)
    assert list(arguments)[:2] == ["source", "overrides"]
    assert arguments["overrides"].default is None


def test_fit_takes_a_config_and_a_workdir():
    arguments = parameters(hp.fit)
    assert list(arguments)[:2] == ["config", "workdir"]
    assert arguments["workdir"].default is None


def test_build_model_takes_a_config():
    assert list(parameters(hp.build_model)) == ["config", "device"]


def test_load_takes_a_path():
    arguments = parameters(hp.load)
    assert next(iter(arguments)) == "path"
    assert (arguments["weights"].default, arguments["step"].default) == ("ema", None)


def test_language_model_has_its_documented_methods():
    arguments = parameters(hp.LanguageModel.generate)
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stream"):
        assert arguments[name].kind is inspect.Parameter.KEYWORD_ONLY, name
    assert list(arguments)[:2] == ["self", "prompt"] and arguments["stream"].default is False
    assert list(parameters(hp.LanguageModel.score)) == ["self", "text"]
    assert list(parameters(hp.LanguageModel.run_with_cache)) == ["self", "text", "names"]
    assert list(parameters(hp.LanguageModel.run_with_edits))[:3] == ["self", "text", "edits"]


def test_score_has_its_documented_numbers():
    from hippocampus.generation.language_model import Score

    score = Score(nats=8.0, tokens=4, words=2, bytes=5)
    assert (score.nats, score.tokens, score.words, score.bytes) == (8.0, 4, 2, 5)
    assert score.nats_per_token == 2.0
    assert score.bits_per_byte == pytest.approx(8 / 0.6931471805599453 / 5)
    assert score.word_ppl == pytest.approx(54.598150033144236)


def test_model_is_a_flax_module_called_with_params_and_tokens():
    import jax
    import jax.numpy as jnp

    config = hp.load_config(importlib.import_module("hippocampus.config_files").defaults(), {
        "model.d_model": 16, "model.n_heads": 2, "model.n_layers": 1, "model.paths": "attention",
        "model.segments.train": 1, "model.vocab_size": 100})
    model = hp.build_model(config)
    tokens = jnp.zeros((2, 3), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    logits, out = jax.jit(model.apply)({"params": params}, tokens)
    assert logits.shape == (2, 3, 100) and logits.dtype == jnp.float32 and isinstance(out, dict)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = hp.trian


def test_importing_the_package_imports_nothing_heavy():
    code = ("import sys, hippocampus\n"
            "heavy = {'jax', 'flax', 'datasets', 'numpy', 'matplotlib', 'orbax', 'tensorboardX'}\n"
            "print(sorted(heavy & set(sys.modules)), len(dir(hippocampus)) > 5)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.stdout.strip() == "[] True", run.stdout


def test_heavy_packages_are_imported_only_where_they_are_used():
    heavy = {"datasets", "matplotlib", "wandb", "torch", "tensorboardX"}
    for path in sorted((ROOT / "hippocampus").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            names = ([node.module or ""] if isinstance(node, ast.ImportFrom)
                     else [alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [])
            found = {name.split(".")[0] for name in names} & heavy
            assert not found, f"{path.name} imports {found} when it is loaded"
