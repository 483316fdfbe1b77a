"""Adapters that PEFT wrote say what PEFT says; PEFT reads ours; what is not done is refused."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hippocampus.backbones.peft_files import read_adapters, write_adapters
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.layers.lora import LoRA, adapted_layers, init_adapters, with_adapters

pytestmark = pytest.mark.usefixtures("quick_compiles")

FAMILIES = ("llama", "qwen3", "gemma3", "gemma3n")
PREFIX = "base_model.model.model.layers"
QUERY = f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def adapter_of(tmp_path, folder_of):
    """family -> a copy of its adapter that a test may change, and functions that change it."""
    def make(family, config=None, tensors=None):
        folder = tmp_path / f"adapter-{family}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(folder_of("peft") / family, folder)
        if config:
            content = config(json.loads((folder / "adapter_config.json").read_text()))
            (folder / "adapter_config.json").write_text(json.dumps(content))
        if tensors:
            changed = tensors(load_file(folder / "adapter_model.safetensors"))
            save_file({name: np.ascontiguousarray(array) for name, array in changed.items()},
                      folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def read(backbone_of, folder_of):
    """A family, and a folder if it is not the committed one -> its kind and adapters."""
    return lambda family, folder=None: read_adapters(
        folder or folder_of("peft") / family, backbone_of(family).model)


# ---------------------------------------------------------------- what is read and written


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_peft(family, backbone_of, reference_of, folder_of, read):
    backbone = backbone_of(family)
    expected = np.load(folder_of("peft") / family / "reference.npz")["logits"]
    lora, adapters = read(family)
    params = with_adapters(backbone.params, adapters, lora)
    with jax.default_matmul_precision("highest"):
        logits, _ = jax.jit(backbone.model.apply)(
            {"params": params}, reference_of(family)["ids"][:, :expected.shape[1]])
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    plain = reference_of(family)["logits"][:, :expected.shape[1]]
    assert np.abs(plain - expected).max() > 1, "the adapter says nothing"


def test_the_kind_of_an_adapter_is_that_of_its_config(read):
    assert read("llama")[0] == LoRA(4, 8.0, 0.1, False, (
        "layers_*.attention.query", "layers_*.attention.value", "layers_*.mlp.down"))
    assert read("qwen3")[0] == LoRA(3, 5.0, 0.0, True, (
        "layers_1.attention.key", "layers_1.attention.out", "layers_1.mlp.up"))
    lora, adapters = read("gemma3n")
    assert {"layers_*.attention.key", "per_layer_in", "streams_in_*"} < set(lora.targets)
    assert "layers_4.attention.key" not in adapted_layers(adapters), "it reads another's"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_read(family, backbone_of, folder_of, read, tmp_path):
    lora, adapters = read(family)
    write_adapters(tmp_path / "new", backbone_of(family).model, adapters, lora, base="a/model")
    again, back = read(family, tmp_path / "new")
    assert again == lora
    same(back, adapters)
    same(*(load_file(folder / "adapter_model.safetensors")
           for folder in (tmp_path / "new", folder_of("peft") / family)))
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text())
                    for folder in (tmp_path / "new", folder_of("peft") / family))
    assert ours.pop("base_model_name_or_path") == "a/model"
    targets = ours.pop("target_modules")
    assert ours == {name: theirs[name] for name in ours}
    expected = {
        "llama": ["down_proj", "q_proj", "v_proj"],
        "qwen3": [f"model.layers.1.{name}" for name in (
            "mlp.up_proj", "self_attn.k_proj", "self_attn.o_proj")]}
    assert targets == expected.get(family, targets)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "new/adapter_model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_every_layer_is_what_all_linear_means(adapter_of, read):
    def all_linear(config):
        return {**config, "target_modules": "all-linear"}

    same(read("gemma3n", adapter_of("gemma3n", all_linear))[1], read("gemma3n")[1])
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        read("llama", adapter_of("llama", all_linear))


def test_half_precision_is_read_as_float32(adapter_of, read):
    folder = adapter_of("llama", tensors=lambda own: {n: a.astype(np.float16)
                                                      for n, a in own.items()})
    found, exact = read("llama", folder)[1], read("llama")[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_an_adapter_of_a_model_that_sees_is_read_for_its_text(adapter_of, read):
    """Its names lie a level deeper, beside those of the part that sees."""
    def tensors(own):
        deeper = {name.replace(".model.model.", ".model.model.language_model."): array
                  for name, array in own.items()}
        return deeper | {f"base_model.model.model.vision_tower.layers.0.q_proj.lora_{side}.weight":
                         np.ones((2, 2), np.float32) for side in "AB"}

    def config(own):
        return {**own, "target_modules": r".*language_model\.layers\.\d\.(mlp\.gate_proj)|"
                r".*language_model\.layers\.0\.self_attn\.o_proj"}

    same(read("gemma3", adapter_of("gemma3", config, tensors))[1], read("gemma3")[1])


def test_peft_reads_what_is_written(backbone_of, reference_of, folder_of, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (extra parity)")
    transformers = pytest.importorskip("transformers")
    for family, lora in (("gemma3n", LoRA(3, 5.0, rslora=True, targets=("*",))),
                         ("llama", LoRA(2, 3.0, targets=("layers_1.*", "*.mlp.up")))):
        backbone, ids = backbone_of(family), reference_of(family)["ids"]
        adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(
            jax.random.key(leaf.size), leaf.shape), init_adapters(
                jax.random.key(0), backbone.params, lora))
        write_adapters(tmp_path / family, backbone.model, adapters, lora)
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder_of(family), attn_implementation="eager", dtype="float32")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / family).eval()
        theirs.requires_grad_(False)
        batch = transformers.BatchEncoding({"input_ids": ids.astype(np.int64)}, tensor_type="pt")
        expected = theirs(**batch, use_cache=False).logits.numpy()
        found, _ = jax.jit(backbone.model.apply)(
            {"params": with_adapters(backbone.params, adapters, lora)}, ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
        assert np.abs(reference_of(family)["logits"] - expected).max() > 1


# ---------------------------------------------------------------- what is refused


def change(**fields):
    return lambda config: {**config, **fields}


@pytest.mark.parametrize(("config", "message"), [
    (change(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
    (lambda config: {"r": 4}, "peft_type = None is not supported"),
    (change(use_dora=True), "use_dora = True is not supported"),
    (change(bias="all"), "bias = 'all' is not supported"),
    (change(lora_bias=True), "lora_bias = True is not supported"),
    (change(modules_to_save=["lm_head"]), "modules_to_save = ['lm_head'] is not supported"),
    (change(rank_pattern={"q_proj": 2}), "rank_pattern = {'q_proj': 2} is not supported"),
    (change(alpha_pattern={"q_proj": 2}), "alpha_pattern = "),
    (change(fan_in_fan_out=True), "fan_in_fan_out = True is not supported"),
    (change(layers_to_transform=0), "layers_to_transform = 0 is not supported"),
    (change(layers_to_transform=[1]), "layers_to_transform = [1] is not supported"),
    (change(exclude_modules=["v_proj"]), "exclude_modules = ['v_proj'] is not supported"),
    (change(init_lora_weights="pissa"), "init_lora_weights = 'pissa' is not supported"),
    (change(trainable_token_indices=[3]), "trainable_token_indices = [3]"),
    (change(a_new_idea={"x": 1}), "a_new_idea = {'x': 1} is not supported"),
    (change(**{"a\nb": 1}), r"a\nb = 1 is not supported"),
    (change(r=0), "r is 0"), (change(r=True), "r is True"), (change(r=2.0), "r is 2.0"),
    (change(lora_alpha="8"), "lora_alpha is '8'"),
    (change(lora_alpha=float("nan")), "lora_alpha is nan"),
    (change(lora_dropout=1), "lora_dropout is 1"),
    (change(use_rslora="yes"), "use_rslora is 'yes'"),
    (change(target_modules=None), "target_modules is None"),
    (change(target_modules=[]), "target_modules is []"),
    (change(target_modules=["q_proj", 3]), "target_modules is ['q_proj', 3]"),
    (change(target_modules="(q_proj"), "target_modules is '(q_proj': missing )"),
    (change(target_modules="x" * 2000), "target_modules is 'xxxx"),
    (change(target_modules=["proj", "embed_tokens"]), "names no linear layer of the model"),
    (change(target_modules="q_proj"), "names no linear layer of the model")])
def test_a_config_that_is_not_supported_is_refused_by_its_field(adapter_of, read, config, message):
    with pytest.raises(DataError) as caught:
        read("llama", adapter_of("llama", config))
    assert message in caught.value.message and caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [
    change(init_lora_weights="gaussian"), change(lora_alpha=8.0, task_type=None),
    lambda config: {name: config[name] for name in (
        "peft_type", "r", "lora_dropout", "target_modules")}])
def test_fields_that_change_nothing_may_be_there_or_not(adapter_of, read, config):
    lora, adapters = read("llama", adapter_of("llama", config))
    assert lora == read("llama")[0]
    same(adapters, read("llama")[1])


def without(name):
    return lambda tensors: {n: a for n, a in tensors.items() if n != name}


def with_tensor(name, array):
    return lambda tensors: {**tensors, name: array}


@pytest.mark.parametrize(("tensors", "message"), [
    (without(QUERY), f"lacks the tensor {QUERY}"),
    (without(QUERY.replace("_A", "_B")), f"lacks the tensor {QUERY.replace('_A', '_B')}"),
    (with_tensor(QUERY, np.ones((4, 47), np.float32)),
     f"{QUERY} has the shape [4, 47]; model and r need [4, 48]"),
    (with_tensor(QUERY, np.ones((3, 48), np.float32)), "has the shape [3, 48]"),
    (with_tensor(QUERY, np.ones((4, 48), np.int8)), f"{QUERY} is int8"),
    (with_tensor(QUERY, np.full((4, 48), np.nan, np.float32)), "are not finite"),
    (with_tensor(QUERY.replace(".0.", ".2."), np.ones((4, 48), np.float32)),
     "no adapter of a linear layer of the model"),
    (with_tensor(QUERY.replace("q_proj", "k_proj"), np.ones((4, 48), np.float32)),
     "which adapter_config.json does not ask for"),
    (with_tensor(QUERY.replace("model.model.", "model.model.language_model."),
                 np.ones((4, 48), np.float32)), "which adapter_config.json does not ask for"),
    *((with_tensor(f"base_model.model.{name}", np.ones((4, 48), np.float32)),
       f"no adapter of a linear layer of the model: base_model.model.{name}") for name in (
           "lm_head.lora_A.weight", "lm_head.weight", "model.embed_tokens.lora_embedding_A",
           "model.norm.lora_A.weight", "model.layers.0.self_attn.q_proj.lora_magnitude_vector"))])
def test_tensors_that_are_not_the_adapter_s_are_refused_by_name(adapter_of, read, tensors, message):
    with pytest.raises(CheckpointError) as caught:
        read("llama", adapter_of("llama", tensors=tensors))
    assert message in caught.value.message and caught.value.hint
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_model_is_refused(read, folder_of):
    with pytest.raises((CheckpointError, DataError)):
        read("qwen3", folder_of("peft") / "llama")


def test_files_that_are_missing_or_cut_short_are_refused(adapter_of, read, tmp_path):
    with pytest.raises(DataError, match="cannot read") as caught:
        read("llama", tmp_path / "nowhere")
    assert "give a folder with adapter_config.json" in caught.value.hint
    folder = adapter_of("llama")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (0, 4, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            read("llama", folder)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="there are no weights at") as caught:
        read("llama", folder)
    assert "adapter_model.bin is never read" in caught.value.hint


def test_what_cannot_be_written_leaves_nothing(backbone_of, read, tmp_path):
    model = backbone_of("llama").model
    lora, adapters = read("llama")
    broken = jax.tree.map(lambda leaf: leaf.at[0, 0].set(np.nan), adapters)
    other = {"layers_7": adapters["layers_0"]}
    for tree, kind, error, message in (
            (broken, lora, CheckpointError, "are not finite"),
            (other, lora, ConfigError, "no linear layer layers_7"),
            (adapters, LoRA(5), ConfigError, "no linear layer layers_0"),
            ({}, lora, ConfigError, "no adapter to write")):
        with pytest.raises(error, match=message):
            write_adapters(tmp_path / "new", model, tree, kind)
    assert not list(tmp_path.iterdir())
    (tmp_path / "new").mkdir()
    (tmp_path / "new/mine").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        write_adapters(tmp_path / "new", model, adapters, lora)
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "mine"]
