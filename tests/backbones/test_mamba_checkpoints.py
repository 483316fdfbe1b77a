"""Checkpoints of Mamba and Mamba-2: the logits of transformers, and what is refused."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hippocampus.backbones.huggingface import write_tensors
from hippocampus.backbones.mamba import load_mamba
from hippocampus.config_files import defaults, load_config
from hippocampus.devices import Device, resolve
from hippocampus.errors import CheckpointError, DataError
from hippocampus.exports.weights_file import write_weights
from hippocampus.models.build_model import build_model, parameter_shapes

pytestmark = pytest.mark.usefixtures("quick_compiles")

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("mamba", "mamba2")


@functools.cache
def loaded(family):
    """Model, parameters, ids, and the logits that transformers gives."""
    values, params = load_mamba(FIXTURES / family)
    config, _ = resolve(load_config(defaults("equilibrium"), values), Device("cpu", "cpu"))
    reference = np.load(FIXTURES / family / "reference.npz")
    return build_model(config), params, jnp.asarray(reference["ids"]), reference["logits"]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    model, params, ids, wanted = loaded(family)
    logits, _ = jax.jit(model.apply)({"params": params}, ids)
    assert np.abs(wanted).max() > 3
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_a_cache_are_those_of_transformers(family):
    model, params, ids, wanted = loaded(family)

    @jax.jit
    def step(ids, cache):
        hidden, cache = model.apply({"params": params}, ids, cache, method="extend")
        return model.head(params).logits(hidden)[..., :wanted.shape[-1]], cache

    cache, found, start = model.init_cache(2, 40), [], 0
    for n in (12, *[1] * 28):
        logits, cache = step(ids[:, start:start + n], cache)
        found.append(logits)
        start += n
    np.testing.assert_allclose(np.concatenate(found, 1), wanted, rtol=0, atol=1e-4)
    sizes = [leaf.shape for leaf in jax.tree.leaves(cache)]
    assert sizes == [leaf.shape for leaf in jax.tree.leaves(model.init_cache(2, 10**6))]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tree_is_that_of_the_model(family):
    model, params, *_ = loaded(family)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), params) == jax.tree.map(
        lambda a: (a.shape, a.dtype), parameter_shapes(model))
    assert not np.asarray(params["embedding"][41:]).any()


def changed(tmp_path, family, config=None, tensors=None):
    """A copy of a fixture; None as a value takes a field or a tensor away."""
    folder = tmp_path / family
    shutil.copytree(FIXTURES / family, folder)
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in content.items() if value is not None}))
    kept = {name: value for name, value in
            (load_file(folder / "model.safetensors") | (tensors or {})).items()
            if value is not None}
    write_weights(folder / "model.safetensors", kept, {"format": "pt"})
    return folder


def assert_same(folder, family):
    values, params = load_mamba(folder)
    wanted_values, wanted = load_mamba(FIXTURES / family)
    assert values == wanted_values
    jax.tree.map(np.testing.assert_array_equal, params, wanted)


def test_several_files_and_an_index_are_read_like_one(tmp_path):
    tensors = load_file(FIXTURES / "mamba" / "model.safetensors")
    shutil.copy(FIXTURES / "mamba" / "config.json", tmp_path)
    write_tensors(tmp_path, tensors.items(), largest=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tmp_path, "mamba")
    next(tmp_path.glob("*-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"no weights at .*00002"):
        load_mamba(tmp_path)


def test_what_an_early_checkpoint_writes_otherwise_means_the_same(tmp_path):
    embedding = load_file(FIXTURES / "mamba" / "model.safetensors")["backbone.embeddings.weight"]
    # Fields at the family's defaults, the table's old name, and the tied output beside it.
    config = dict.fromkeys(("tie_word_embeddings", "expand", "conv_kernel", "state_size",
                            "use_bias", "use_conv_bias", "layer_norm_epsilon"))
    folder = changed(tmp_path, "mamba", config | {"time_step_rank": 2}, {
        "backbone.embeddings.weight": None, "backbone.embedding.weight": embedding,
        "lm_head.weight": embedding})
    assert_same(folder, "mamba")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_in_half_precision_become_float32(tmp_path, dtype):
    tensors = load_file(FIXTURES / "mamba2" / "model.safetensors")
    half = {name: value.astype(jnp.dtype(dtype)) for name, value in tensors.items()}
    _, params = load_mamba(changed(tmp_path, "mamba2", {"dtype": dtype}, half))
    _, wanted = load_mamba(FIXTURES / "mamba2")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), params, wanted)


@pytest.mark.parametrize(("family", "config", "message"), [
    ("mamba", {"model_type": "falcon_mamba"}, "model_type is 'falcon_mamba'"),
    ("mamba", {"model_type": None, "ssm_cfg": {}}, "model_type is None"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ("mamba", {"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
    ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit = \[0.0, 0.1\] is not supp"),
    ("mamba2", {"rms_norm": False}, "rms_norm = False is not supported"),
    ("mamba2", {"num_heads": 5}, "num_heads = 5, head_dim = 8 and n_groups = 2 do not fit"),
    ("mamba2", {"n_groups": 4}, "n_groups = 4 do not fit"),
    ("mamba", {"hidden_size": None}, "hidden_size is None"),
    ("mamba", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ("mamba", {"state_size": "16"}, "state_size is '16'"),
    ("mamba", {"use_bias": 1}, "use_bias is 1"),
    ("mamba", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0")])
def test_what_is_not_done_here_is_refused_by_the_name_of_its_field(
        tmp_path, family, config, message):
    with pytest.raises(DataError, match=message) as caught:
        load_mamba(changed(tmp_path, family, config))
    assert caught.value.hint and "\n" not in str(caught.value)


LAYER = "backbone.layers.1.mixer"


@pytest.mark.parametrize(("family", "tensors", "message"), [
    ("mamba", {f"{LAYER}.A_log": None}, rf"lacks the tensor {LAYER}.A_log"),
    ("mamba2", {"lm_head.weight": None}, "lacks the tensor lm_head.weight"),
    ("mamba", {f"{LAYER}.conv1d.weight": np.zeros((48, 4), np.float32)},
     r"conv1d.weight has the shape \[48, 4\]; the model needs \[48, 1, 4\]"),
    ("mamba2", {f"{LAYER}.in_proj.weight": np.zeros((24, 166), np.float32)},
     r"in_proj.weight has the shape \[24, 166\]; the model needs \[166, 24\]"),
    ("mamba", {"backbone.embeddings.weight": np.zeros((40, 24), np.float32)},
     r"embeddings.weight has the shape \[40, 24\]; the model needs \[41, 24\]"),
    ("mamba", {f"{LAYER}.D": np.zeros(48, np.int32)}, "D is int32"),
    ("mamba", {f"{LAYER}.dt_layernorm.weight": np.zeros(2, np.float32)},
     rf"a tensor that a Mamba has not: '{LAYER}.dt_layernorm.weight'"),
    ("mamba2", {f"{LAYER}.D": np.full(6, np.nan, np.float32)}, "D has weights that are not finite"),
])
def test_tensors_of_another_model_are_refused_by_name(tmp_path, family, tensors, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_mamba(changed(tmp_path, family, tensors=tensors))
    assert caught.value.hint and "\n" not in str(caught.value)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*config\.json"):
        load_mamba(tmp_path)
    shutil.copy(FIXTURES / "mamba" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="there are no weights") as caught:
        load_mamba(tmp_path)
    assert "pytorch_model.bin is never read" in caught.value.hint
