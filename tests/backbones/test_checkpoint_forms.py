"""Every form that a checkpoint comes in gives the same model; what is not right is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from hippocampus.backbones.config_json import read_architecture, write_config
from hippocampus.backbones.loading import Backbone, is_backbone, load_backbone, save_backbone
from hippocampus.backbones.names import is_left_out, plain_name
from hippocampus.backbones.parameters import count_parameters, parameter_shapes
from hippocampus.errors import CheckpointError, ConfigError, DataError

FAMILIES = ("llama", "qwen3", "gemma3", "gemma3n")
OLD_GEMMA = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def copy_of(tmp_path, folder_of):
    """family -> a copy that a test may change, and functions that change it."""
    def make(family, config=None, tensors=None):
        folder = tmp_path / family
        shutil.copytree(folder_of(family), folder)
        if config:
            content = config(json.loads((folder / "config.json").read_text()))
            (folder / "config.json").write_text(json.dumps(content))
        if tensors:
            changed = tensors(load_file(folder / "model.safetensors"))
            save_file({name: np.ascontiguousarray(array) for name, array in changed.items()},
                      folder / "model.safetensors")
        return folder

    return make


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("family", FAMILIES)
def test_the_count_of_parameters_is_that_of_the_file(family, backbone_of, folder_of):
    tensors = load_file(folder_of(family) / "model.safetensors")
    assert count_parameters(backbone_of(family).model) == sum(a.size for a in tensors.values())


def test_a_sharded_checkpoint_is_the_whole_one(backbone_of, tmp_path):
    whole = backbone_of("llama")
    save_backbone(tmp_path / "parts", whole, largest=40_000)
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert f"model-00001-of-{len(names) - 2:05d}.safetensors" in names and len(names) > 4
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith(".safetensors")}
    same(load_backbone(tmp_path / "parts").params, whole.params)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_was_loaded(family, backbone_of, folder_of, tmp_path):
    backbone = backbone_of(family)
    save_backbone(tmp_path / "saved", backbone)
    again = load_backbone(tmp_path / "saved")
    assert again.model == backbone.model
    ours, theirs = (load_file(folder / "model.safetensors")
                    for folder in (tmp_path / "saved", folder_of(family)))
    same(ours, theirs)


def test_bfloat16_stays_so_or_becomes_what_is_asked(backbone_of, tmp_path):
    save_backbone(tmp_path / "half", backbone_of("qwen3"), dtype="bfloat16")
    tensors = load_file(tmp_path / "half/model.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), backbone_of("qwen3").params)
    same(load_backbone(tmp_path / "half").params, rounded)
    same(load_backbone(tmp_path / "half", dtype="float32").params,
         jax.tree.map(lambda a: a.astype(jnp.float32), rounded))


def test_config_json_of_transformers_4_says_the_same(copy_of, folder_of):
    def old_llama(config):
        rope = config.pop("rope_parameters")
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope,
                   "torch_dtype": config.pop("dtype")}
        return config

    def old_gemma(config):
        ropes = config.pop("rope_parameters")
        stretch = {"rope_type": "linear", "factor": ropes["full_attention"]["factor"]}
        config.pop("layer_types")
        return {**config, **OLD_GEMMA, "rope_scaling": stretch, "sliding_window_pattern": 3}

    for family, old in (("llama", old_llama), ("gemma3", old_gemma)):
        new = read_architecture(folder_of(family) / "config.json")
        assert read_architecture(copy_of(family, old) / "config.json") == new


def test_the_text_of_a_gemma_3n_that_sees_and_hears_is_the_text_model(copy_of, backbone_of):
    """Its fields lie a level deeper, its tensors under a longer name beside others."""
    def config(text):
        text.pop("rope_parameters")
        return {"model_type": "gemma3n", "text_config": {**text, **OLD_GEMMA}}

    def tensors(own):
        out = {name.replace("model.", "model.language_model."): a for name, a in own.items()}
        out |= {f"model.language_model.layers.4.self_attn.{name}.weight": np.ones(shape, np.float32)
                for name, shape in (("k_proj", (32, 32)), ("v_proj", (32, 32)), ("k_norm", (16,)))}
        return out | {"model.vision_tower.x.weight": np.ones((3, 3), np.float32),
                      "model.audio_tower.y.weight": np.ones(3, np.float32),
                      "model.embed_vision.z": np.ones(3, np.float32)}

    found = load_backbone(copy_of("gemma3n", config, tensors))
    assert found.model == backbone_of("gemma3n").model
    same(found.params, backbone_of("gemma3n").params)


@pytest.mark.parametrize(("name", "plain", "left_out"), [
    ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", False),
    ("language_model.model.norm.weight", "model.norm.weight", False),
    ("model.language_model.norm.weight", "model.norm.weight", False),
    ("language_model.lm_head.weight", "lm_head.weight", True),
    ("vision_tower.encoder.x.weight", "vision_tower.encoder.x.weight", True),
    ("multi_modal_projector.mm_soft_emb_norm.weight", None, True),
    ("model.embed_audio.embedding.weight", None, True),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", None, True),
    ("model.layers.0.self_attn.k_proj.weight", None, False),
    ("model.layers.3.self_attn.k_proj.weight", None, True),
    ("model.layers.3.self_attn.q_proj.weight", None, False),
    ("model.layers.9.self_attn.k_proj.weight", None, False)])
def test_a_decoder_s_own_tensors_are_told_from_the_others(backbone_of, name, plain, left_out):
    assert plain_name(name) == (plain or name)
    assert is_left_out(plain_name(name), backbone_of("gemma3n").model.config) is left_out


def test_fields_that_a_gemma_leaves_out_are_those_of_its_family(tmp_path):
    """As published for the larger Gemma 3: a text_config of a few fields."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}}))
    cfg = read_architecture(tmp_path / "config.json")
    assert (cfg.vocab_size, cfg.n_heads, cfg.n_kv_heads, cfg.head_width) == (262_208, 8, 4, 256)
    assert [spec.window for spec in cfg.layers[:7]] == [1024] * 5 + [0, 1024]
    assert cfg.layers[0].rope.theta == 1e4 and cfg.layers[0].rope.kind == "default"
    assert (cfg.layers[5].rope.theta, cfg.layers[5].rope.factor) == (1e6, 8.0)


def test_a_published_config_has_the_published_number_of_parameters(tmp_path):
    """Llama-3.2-3B and the text of Gemma-3n-E2B, as counted from their tensors."""
    from hippocampus.backbones.loading import build_decoder

    llama = {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192,
             "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
             "head_dim": 128, "vocab_size": 128_256, "tie_word_embeddings": True}
    gemma = {"model_type": "gemma3n_text", "hidden_size": 2048, "intermediate_size": 8192,
             "num_hidden_layers": 30, "num_kv_shared_layers": 10}
    for content, wanted in ((llama, 3.21e9), (gemma, 4.44e9)):
        (tmp_path / "config.json").write_text(json.dumps(content))
        model = build_decoder(read_architecture(tmp_path / "config.json"))
        assert count_parameters(model) == pytest.approx(wanted, rel=2e-3)


def test_parameters_go_where_they_are_told(folder_of, backbone_of):
    mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1],
                         axis_types=(AxisType.Auto,))
    asked = []

    def places(shapes):
        asked.append(shapes)
        return jax.tree.map(lambda leaf: NamedSharding(
            mesh, PartitionSpec(*[None] * (len(leaf.shape) - 1), "fsdp")), shapes)

    found = load_backbone(folder_of("llama"), sharding=places)
    assert asked == [parameter_shapes(found.model)]
    assert all(leaf.sharding.spec[-1] == "fsdp" for leaf in jax.tree.leaves(found.params))
    same(found.params, backbone_of("llama").params)


def test_reading_holds_one_tensor_at_a_time(folder_of, monkeypatch):
    """The next tensor is read when the one before is gone from the host."""
    import weakref

    from hippocampus.backbones import loading

    alive, most = [], []
    original = loading.open_folder

    import contextlib

    @contextlib.contextmanager
    def watched(folder):
        with original(folder) as source:
            def read(name):
                most.append(sum(ref() is not None for ref in alive))
                array = source.read(name).copy()
                alive.append(weakref.ref(array))
                return array

            yield dataclasses.replace(source, read=read)

    monkeypatch.setattr(loading, "open_folder", watched)
    # Put aside as device arrays that do not share the host's memory.
    original_make = jax.make_array_from_callback
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, place, part: original_make(
        shape, place, lambda index: np.array(part(index))))
    load_backbone(folder_of("llama"))
    assert len(most) == 20 and max(most) <= 1


# ---------------------------------------------------------------- what is refused


def change(**fields):
    return lambda config: {**config, **fields}


@pytest.mark.parametrize(("family", "config", "message"), [
    ("llama", change(model_type="falcon"), "architecture 'falcon' is not known"),
    ("llama", change(model_type=["llama"]), "is not known"),
    ("llama", change(attention_bias=True), "attention_bias = True is not supported"),
    ("llama", change(mlp_bias=True), "mlp_bias = True is not supported"),
    ("llama", change(hidden_act="relu"), "hidden_act = relu is not supported"),
    ("llama", change(quantization_config={"bits": 4}), "quantization_config = "),
    ("gemma3", change(attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
    ("gemma3", change(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gemma3n", change(altup_active_idx=1), "altup_active_idx = 1 is not supported"),
    ("llama", change(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
     "type 'yarn' are not supported"),
    ("llama", change(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0}),
     "low_freq_factor is None"),
    ("llama", change(num_hidden_layers=0), "num_hidden_layers is 0"),
    ("llama", change(num_hidden_layers=10**8), "num_hidden_layers is 100000000"),
    ("llama", change(hidden_size="48"), "hidden_size is '48'"),
    ("llama", change(num_key_value_heads=4), "6 query heads over 4 key heads"),
    ("llama", change(rms_norm_eps=float("nan")), "rms_norm_eps is nan"),
    ("gemma3", change(layer_types=["full_attention"]), "layer_types is"),
    ("gemma3n", change(num_kv_shared_layers=5), "num_kv_shared_layers is 5"),
    ("gemma3n", change(intermediate_size=[64, 64]), "intermediate_size is"),
    ("gemma3n", change(activation_sparsity_pattern=1.5), "activation_sparsity_pattern is 1.5"),
])
def test_a_config_that_is_not_supported_is_refused_by_its_field(copy_of, family, config, message):
    with pytest.raises(DataError) as caught:
        load_backbone(copy_of(family, config))
    assert message in caught.value.message and caught.value.hint
    assert "\n" not in str(caught.value)


def without(name):
    return lambda tensors: {n: a for n, a in tensors.items() if n != name}


def with_tensor(name, array):
    return lambda tensors: {**tensors, name: array}


FIRST = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("tensors", "message"), [
    (without("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj"),
    (with_tensor(f"{FIRST}.weight", np.ones((48, 47), np.float32)),
     f"{FIRST}.weight has the shape [48, 47]; the model needs [48, 48]"),
    (with_tensor("model.embed_tokens.weight", np.ones((96, 48), np.float32)), "needs [97, 48]"),
    (with_tensor(f"{FIRST}.bias", np.ones(48, np.float32)), f"has not: {FIRST}.bias"),
    (with_tensor("model.layers.2.mlp.up_proj.weight", np.ones((2, 2), np.float32)),
     "a tensor that a llama has not"),
    (with_tensor("model.norm.weight", np.ones(48, np.int32)), "model.norm.weight is int32"),
    (with_tensor("model.norm.weight", np.full(48, np.nan, np.float32)), "are not finite"),
])
def test_tensors_that_are_not_the_model_s_are_refused_by_name(copy_of, tensors, message):
    with pytest.raises(CheckpointError) as caught:
        load_backbone(copy_of("llama", tensors=tensors))
    assert message in caught.value.message and caught.value.hint
    assert "\n" not in str(caught.value)


def test_shapes_are_checked_before_anything_is_read(copy_of, monkeypatch):
    folder = copy_of("llama", tensors=without("model.norm.weight"))
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.norm"):
        load_backbone(folder)


def test_a_file_that_is_cut_short_is_refused(copy_of):
    folder = copy_of("llama")
    whole = (folder / "model.safetensors").read_bytes()
    for size in (4, 1000, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            load_backbone(folder)


def test_an_index_that_does_not_fit_its_files_is_refused(backbone_of, tmp_path):
    folder = tmp_path / "parts"
    save_backbone(folder, backbone_of("llama"), largest=40_000)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    for file, message in ((f"../{first}", "names the file"), (3, "names the file"),
                          ("gone.safetensors", "there are no weights at"),
                          (first, "promises")):
        changed = {**index["weight_map"], "model.norm.weight": file}
        path.write_text(json.dumps({"weight_map": changed}))
        with pytest.raises(CheckpointError, match=message):
            load_backbone(folder)
    path.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(CheckpointError, match="no weight_map"):
        load_backbone(folder)


def test_a_folder_without_a_model_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert not is_backbone(path)
        with pytest.raises(DataError, match="no pretrained model at"):
            load_backbone(path)


def test_nothing_is_left_of_a_folder_that_could_not_be_written(backbone_of, tmp_path):
    whole = backbone_of("llama")
    params = {**whole.params, "norm_out": {"scale": jnp.full(48, jnp.nan)}}
    with pytest.raises(CheckpointError, match="not finite"):
        save_backbone(tmp_path / "new", Backbone(whole.model, params))
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("kept")
    with pytest.raises(ConfigError, match="is not empty"):
        save_backbone(tmp_path / "mine", whole)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_config_json_is_read_back_as_it_was_written(tmp_path, folder_of):
    for family in FAMILIES:
        cfg = read_architecture(folder_of(family) / "config.json")
        (tmp_path / "config.json").write_text(json.dumps(write_config(cfg, "float32")))
        assert read_architecture(tmp_path / "config.json") == cfg
