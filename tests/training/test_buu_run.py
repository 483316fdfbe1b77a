"""Whole runs of a Buu: what is trained, what stays in every bit, going on, and what it costs."""

import functools
import importlib
import json
import shutil
from pathlib import Path

import buu_run
import chopt_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import fit_quietly

from hippocampus.backbones.architecture import Architecture, LayerSpec, architecture_text
from hippocampus.backbones.loading import load_backbone, weights_digest
from hippocampus.backbones.rotary import Rope
from hippocampus.config_files import defaults, load_config
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.generation.loading import load
from hippocampus.models.build_model import build_model
from hippocampus.models.halves import frozen_shapes, trained_shapes
from hippocampus.models.trained_share import trained_share
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training.check import describe
from hippocampus.training.data import read_data
from hippocampus.training.loop import fit
from hippocampus.training.opening import from_files, with_architecture
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.sharding import make_mesh
from hippocampus.training.step import jit_train_step, sharded_init, train_step

pytestmark = pytest.mark.usefixtures("quick_compiles")

HALF = 3
ROOT = Path(__file__).resolve().parents[2]


def training():
    return buu_run.config(checkpoint__every_steps=HALF, checkpoint__keep_latest=9)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fit_quietly(training(), tmp_path_factory.mktemp("buu") / "run")


def assert_untouched(backbone) -> None:
    wanted = load_backbone(chopt_run.decoder()).params
    for (path, leaf), found in zip(jax.tree_util.tree_leaves_with_path(wanted),
                                   jax.tree.leaves(backbone), strict=True):
        assert np.array_equal(jnp.asarray(leaf, found.dtype), found), path


def test_the_decoder_keeps_every_bit_and_the_adapters_learn(run):
    lm = load(run, weights="raw")
    assert_untouched(lm.params["backbone"])
    adapter = lm.params["adapters"]["layers_1"]
    assert set(lm.params["adapters"]) == {"layers_1"}
    assert all(np.abs(adapter[name]["kernel"]).max() > 0 for name in ("out", "gate"))
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "adapters/gate/1" in row]
    assert rows and 0 < rows[-1]["adapters/gate/1"] < 1
    assert "trained: " in (run.parent / "printed").read_text()


def test_checkpoints_hold_the_adapters_alone_and_the_run_the_digest_of_the_decoder(run):
    for tree in ("params", "ema", "optimizer"):
        names = (run / "steps" / "6" / tree / "_METADATA").read_text()
        assert "adapters" in names and "embedding" not in names and "backbone" not in names
    assert set(trained_shapes(load(run).model)) == {"adapters"}
    kept = json.loads((run / "backbone.json").read_text())
    assert kept == {"digest": weights_digest(chopt_run.decoder())}


@pytest.mark.full
def test_a_run_goes_on_bit_for_bit(run, tmp_path):
    killed = shutil.copytree(run, tmp_path / "killed")
    for step in (killed / "steps").iterdir():
        if step.name.isdecimal() and int(step.name) > HALF:
            shutil.rmtree(step)
    (killed / "results.json").unlink()
    fit_quietly(training(), killed)
    for one, other in zip(jax.tree.leaves(load(run).params), jax.tree.leaves(load(killed).params),
                          strict=True):
        assert np.array_equal(one, other)


def test_texts_are_continued_together_as_each_alone(run):
    lm, prompts = load(run), ["the cat", "a dog sat on", "the"]
    together = lm.generate(prompts, max_new_tokens=6, temperature=0)
    assert together == [lm.generate(one, max_new_tokens=6, temperature=0) for one in prompts]
    _, found = lm.run_with_cache("the cat", names="layers.*.adapter.gate")
    assert list(found) == ["layers.1.adapter.gate"]


def test_another_decoder_is_refused(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    config = json.loads((other / "config.json").read_text())
    config["model"]["backbone"]["path"] = str(chopt_run.decoder(seed=1))
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not the decoder"):
        load(other)


def one_step(config):
    """The state after the first step of a run."""
    config, _ = resolve(with_architecture(config))
    model, data = build_model(config), read_data(config)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    make, like, _ = sharded_init(model, optimizer, config, make_mesh(config.mesh))
    before = from_files(config, model, like, make, True)
    after, metrics = jax.jit(train_step(model, optimizer, config))(
        before, data.batches(config).batch(0))
    assert np.isfinite(metrics["train/loss"])
    return before, after


def test_the_control_trains_low_rank_adapters_alone():
    before, after = one_step(buu_run.config(buu_run.LORA))
    assert set(after.params) == {"lora"} and set(after.frozen) == {"backbone"}
    assert_untouched(after.frozen["backbone"])
    assert any(not np.array_equal(a, b) for a, b in zip(
        jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True))


def test_questions_about_stories_are_trained_and_scored_beside_a_decoder_of_another_type(tmp_path):
    config = buu_run.config(buu_run.STORIES, model__backbone__dtype="bfloat16", train__steps=2,
                            eval__every_steps=0)
    folder = fit_quietly(config, tmp_path / "run")
    assert np.isfinite(json.loads((folder / "results.json").read_text())["final/loss"])
    backbone = load(folder, weights="raw").params["backbone"]
    assert_untouched(backbone)


@pytest.mark.parametrize(("changes", "said"), [
    ({"model__adapters__count": 3}, "model.adapters.count = 3 of 2 layers"),
    ({"model__adapters__layers": (2,)}, "names layer 2"),
    ({"model__adapters__layers": (1, 1)}, "names layer 1 twice"),
    ({"model__adapters__layers": (1,), "model__adapters__count": 2}, "leave one of them out"),
    ({"model__adapters__count": 0}, "nothing is trained"),
    ({"model__adapters__gate_bias": 1.0}, "model.adapters.mix=interpolate"),
    ({"model__adapters__memory__top_k": 9}, "model.adapters.memory.top_k = 9"),
    ({"model__adapters__memory__heads": 3}, "does not divide the width 8"),
    ({"model__adapters__ssm__expansion": 0.2}, "3 channels of 16, and the gates have 2 blocks"),
    ({"mesh__sequence": 2}, "mesh.sequence = 2"),
    ({"data__tokenizer": "bytes"}, "data.tokenizer=backbone"),
    ({"model__lora__rank": 2}, "model.backbone.train=lora"),
], ids=str)
def test_what_does_not_go_together_is_refused_in_a_line(changes, said, tmp_path):
    with pytest.raises(ConfigError) as error:
        fit(buu_run.config(**changes), tmp_path / "run")
    assert said in f"{error.value}" and "\n" not in f"{error.value}"
    assert not (tmp_path / "run").exists()


def shipped(name: str, arg: str = "", **changes):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return load_config(module.get_config(arg), {
        "name": name, **{key.replace("__", "."): value for key, value in changes.items()}})


@functools.cache
def share(name: str, arg: str = ""):
    config, _ = resolve(shipped(name, arg))
    return trained_share(build_model(config), config)


def test_five_layers_of_e2b_have_the_published_number_of_adapter_parameters():
    found = share("buu_gemma3n_e2b", "e2b")
    assert found.matrices == 65_536_000 and f"{found.share:.2%}" == "1.19%"
    assert 0 < found.trained - found.matrices < found.matrices / 1000
    assert share("buu_gemma3n_e2b", "e4b").matrices == 65_536_000
    said = describe(shipped("buu_gemma3n_e2b", "e2b", mesh__fsdp=1))
    assert "65,536,000 of them in matrices and slots: 1.19%" in said


@pytest.mark.parametrize("name", ["buu_smollm2", "buu_tiny"])
def test_adapters_and_their_control_have_equally_many_parameters(name):
    adapters, control = share(name), share(name, "lora")
    assert abs(adapters.trained / control.trained - 1) < 0.01


def test_training_needs_the_decoder_once_and_five_times_the_adapters():
    """Weights, moments, gradients and updates of what is trained; no second copy of the rest."""
    wide = Architecture("llama", 512, 256, 4, 2, 64, 128, (LayerSpec(1024, Rope(1e4)),) * 4,
                        1e-6, 8**-0.5)
    config, _ = resolve(load_config(defaults("buu"), {
        "model.backbone.architecture": architecture_text(wide), "model.vocab_size": 512,
        "model.adapters.count": 1, "data.tokenizer": "backbone", "data.context": 8,
        "train.batch_size": 1, "ema.decay": 0.0}))
    model, mesh = build_model(config), make_mesh(config.mesh)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    _, like, shardings = sharded_init(model, optimizer, config, mesh)
    tokens = np.zeros((1, 8), np.int32)
    step = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    used = step.lower(like, Batch(tokens, tokens, np.ones((1, 8), np.float32))).compile(
        ).memory_analysis()

    def size(shapes):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    base, adapters = size(frozen_shapes(model, config)), size(trained_shapes(model))
    peak = (used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
            + used.temp_size_in_bytes)
    activations = 2**20  # of eight tokens
    assert base > 16 * adapters
    assert peak <= base + 5 * adapters + activations
