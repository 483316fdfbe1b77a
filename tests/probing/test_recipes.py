"""The Python of docs/probing.md runs; recipes are short and find what they say they find."""

import re
from pathlib import Path

import numpy as np
import pytest
from planted import probe_of

import hippocampus as hp
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.generation.language_model import LanguageModel
from hippocampus.probing import probe
from hippocampus.probing.results import write_suite
from hippocampus.probing.suites import ssm

pytestmark = pytest.mark.usefixtures("quick_compiles")

DOCS = Path(__file__).resolve().parents[2] / "docs/probing.md"
RECIPES = dict(re.findall(r"### (\w[\w ]+)\n(?:(?!###).)*?<!-- tested -->\n```python\n(.*?)```",
                          DOCS.read_text("utf-8"), re.DOTALL))
BLOCKS = re.findall(r"<!-- tested -->\n```python\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
MODELS = [
    pytest.param({"model.paths": ("hopfield", "attention")}, id="two paths, two passes"),
    pytest.param({}, id="all paths", marks=pytest.mark.full),
    pytest.param({"model.segments.train": 1, "model.attention.n_kv_heads": 1,
                  "model.tie_embeddings": False}, id="one pass, grouped keys",
                 marks=pytest.mark.full)]


@pytest.fixture(scope="module", params=MODELS)
def run_recipe(request, built, tiny_config):
    """Runs a recipe as it stands, on a model with random parameters; returns its names."""
    overrides = {"model.vocab_size": 256, "data.context": 32, **request.param}
    lm = LanguageModel(*built(overrides), byte_tokenizer(), tiny_config(overrides))

    def run(name):
        names = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hp, "load", lambda folder: lm, raising=False)
            exec(RECIPES[name], names)
        return names

    return run


def test_there_are_four_and_each_has_at_most_fifteen_lines():
    assert set(RECIPES) == {"Activation patching", "Direct logit attribution",
                            "Path attribution", "Head attribution"}
    for name, code in RECIPES.items():
        assert len(code.strip().splitlines()) <= 15, name


def test_a_patch_of_the_last_layer_restores_all_at_the_last_token_and_nothing_elsewhere(run_recipe):
    restored = run_recipe("Activation patching")["restored"]
    assert restored.shape == (2, len("if x is not No"))
    np.testing.assert_allclose(restored[-1, -1], 1, rtol=1e-3)
    assert np.abs(restored[-1, :-1]).max() < 1e-3
    # Before the prompts differ there is nothing to restore.
    assert np.abs(restored[:, :-2]).max() < 1e-3 and abs(restored[0, -2]) > 1e-3


def test_the_parts_of_a_logit_are_the_logit(run_recipe):
    found = run_recipe("Direct logit attribution")
    assert set(found["parts"]) == {"embedding", *(
        f"layers.{i}.{part}.out" for i in range(2) for part in ("mixer", "mlp"))}
    np.testing.assert_allclose(sum(found["parts"].values()),
                               found["logits"][0, -1, found["token"]], rtol=1e-4)


def test_the_paths_of_a_layer_say_what_its_mixer_says(run_recipe, capsys):
    found = run_recipe("Path attribution")
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(path in printed[1] for path in found["paths"])
    assert found["said"].shape == (len(found["paths"]),)
    assert np.abs(found["said"]).min() > 1e-6


def test_the_heads_of_a_path_say_what_the_path_says(run_recipe):
    found = run_recipe("Head attribution")
    assert found["said"].shape == (2,) and np.abs(found["said"]).min() > 1e-6


def test_an_own_probe_measures_and_sees(built, tiny_config, monkeypatch, capsys):
    own = probe_of(built, tiny_config, {"model.paths": ("hopfield", "attention"),
                                        "model.segments.train": 1})
    monkeypatch.setattr(probe, "open_probe", lambda folder, max_windows: own)
    code, = (block for block in BLOCKS if "open_probe" in block)
    names: dict = {}
    exec(code, names)
    damage, sizes = capsys.readouterr().out.splitlines()
    assert damage.endswith("nats/token") and names["damage"].nats != 0
    assert all(f"layers.{i}.residual" in sizes for i in range(own.n_layers))


def test_results_are_read_again(built, tiny_config, monkeypatch, tmp_path, capsys):
    own = probe_of(built, tiny_config, {"model.paths": ("ssm",), "model.segments.train": 1})
    write_suite(tmp_path / "checkpoints/quickstart/probes", ssm.run(own), {"command": ["x"]})
    monkeypatch.chdir(tmp_path)
    code, = (block for block in BLOCKS if "read_suites" in block)
    exec(code, {})
    assert capsys.readouterr().out.startswith("ssm Memory of the state-space channels 2")


def test_every_tested_block_is_tested_here():
    assert len(BLOCKS) == len(RECIPES) + 2
