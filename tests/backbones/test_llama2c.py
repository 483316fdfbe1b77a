"""llama2.c files: a real one that writes its known text, and any that are damaged."""

import itertools
import struct

import jax
import numpy as np
import pytest

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.llama2c import read_tokenizer_bin
from hippocampus.backbones.loading import build_decoder, load_backbone
from hippocampus.backbones.parameters import named_tensors, parameter_shapes
from hippocampus.backbones.rotary import Rope
from hippocampus.errors import CheckpointError, DataError
from hippocampus.generation.pretrained import load_pretrained

pytestmark = pytest.mark.usefixtures("quick_compiles")

GOLDEN = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She "
    "said, \"I want to play with your ball, but I can't find it.\"\n"
    "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to "
    "do.\"\nLily didn't want to help her mom, so she")
"""What llama2.c writes with stories260K: 200 tokens, always the most likely one."""

WIDTH, HEADS, KV, LAYERS, MLP, VOCABULARY, CONTEXT = 16, 4, 2, 2, 24, 9, 12
PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", "<0x0A>", " ", "a", "b", "ab", " ab"]


@pytest.fixture(scope="module")
def drawn():
    """A random model of this form: (architecture, parameters)."""
    cfg = Architecture("llama", VOCABULARY, WIDTH, HEADS, KV, WIDTH // HEADS, CONTEXT,
                       (LayerSpec(MLP, Rope(1e4)),) * LAYERS, 1e-5, (WIDTH // HEADS)**-0.5,
                       tie_embeddings=False)
    rng = np.random.default_rng(0)
    return cfg, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
                             parameter_shapes(build_decoder(cfg)))


def neighbours(weight, heads):
    """Rows as a `.bin` has them: what lies half a head apart becomes two neighbours."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def folder(drawn, tmp_path):
    """A `.bin` of the random model and a tokenizer of nine pieces, written as llama2.c does."""
    cfg, params = drawn
    tensors = {name.removesuffix(".weight"): a for name, a in named_tensors(params, cfg)}
    parts = [tensors["model.embed_tokens"]]
    for kind in ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                 "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj",
                 "mlp.up_proj"):
        for i in range(LAYERS):
            part = tensors[f"model.layers.{i}.{kind}"]
            heads = {"q_proj": HEADS, "k_proj": KV}.get(kind.split(".")[-1])
            parts.append(neighbours(part, heads) if heads else part)
    parts += [tensors["model.norm"], np.zeros(2 * CONTEXT * WIDTH // HEADS // 2, np.float32),
              tensors["lm_head"]]
    header = struct.pack("<7i", WIDTH, MLP, LAYERS, HEADS, KV, -VOCABULARY, CONTEXT)
    (tmp_path / "model.bin").write_bytes(header + b"".join(part.tobytes() for part in parts))
    tokens = struct.pack("<i", 5)
    for i, piece in enumerate(PIECES):
        tokens += struct.pack("<fi", -float(i), len(piece)) + piece.encode()
    (tmp_path / "tok9.bin").write_bytes(tokens)
    return tmp_path


def test_a_bin_gives_the_parameters_that_were_written(folder, drawn):
    found = load_backbone(folder / "model.bin")
    padded = jax.tree.map(np.array, drawn[1])
    for table in ("embedding", "head"):
        padded[table][VOCABULARY:] = 0
    assert found.model.config == drawn[0]
    jax.tree.map(np.testing.assert_array_equal, found.params, padded)


def test_pieces_are_merged_by_their_scores(folder):
    tokenizer = load_backbone(folder / "model.bin").tokenizer
    assert tokenizer.encode("ab\nb").tolist() == [1, 8, 3, 6]
    assert tokenizer.encode("").tolist() == [1] and tokenizer.encode("<s>b").tolist()[0] == 1
    assert tokenizer.decode(tokenizer.encode("ab\nb")[1:]) == "ab\nb"
    assert tokenizer.end_ids == (2, 1)
    (folder / "tok9.bin").unlink()
    assert load_backbone(folder / "model.bin").tokenizer is None
    with pytest.raises(DataError, match="there is no tokenizer beside"):
        load_pretrained(folder / "model.bin")


def test_damaged_files_are_refused(folder):
    whole = (folder / "model.bin").read_bytes()
    for content, message in ((whole[:-4], "its header asks for"), (whole[:20], "llama2.c's form"),
                             (whole + b"\0\0\0\0", "its header asks for"),
                             (b"PK\x03\x04" + whole, "llama2.c's form"),
                             (struct.pack("<7i", *[2**30] * 7), "its header says"),
                             (struct.pack("<7i", 16, 24, 2, 5, 5, 9, 12), "its header says")):
        (folder / "model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_backbone(folder / "model.bin")
        assert caught.value.hint
    tokens = (folder / "tok9.bin").read_bytes()
    for content in (tokens[:-1], tokens[:10], tokens[:4], b"",
                    tokens[:4] + struct.pack("<fi", 0.0, -3) + tokens[4:],
                    tokens + struct.pack("<fi", float("nan"), 1) + b"c"):
        (folder / "tok9.bin").write_bytes(content)
        with pytest.raises(DataError, match="not a tokenizer"):
            read_tokenizer_bin(folder / "tok9.bin")


def test_stories260k_writes_its_known_text(real_data):
    lm = load_pretrained(real_data("stories260K/stories260K.bin"), compute_dtype="float32")
    assert lm.generate("", max_new_tokens=200, temperature=0).lstrip() == GOLDEN


def test_stories260k_s_tokenizer_merges_the_best_pair_first(real_data):
    """As llama2.c does it, one pair after the other."""
    tokenizer = read_tokenizer_bin(real_data("stories260K/tok512.bin"))
    raw = real_data("stories260K/tok512.bin").read_bytes()
    pieces, scores, at = [], [], 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8:at + 8 + length])
        scores.append(score)
        at += 8 + length
    index = {piece: i for i, piece in enumerate(pieces)}

    def encode(text):
        ids = [1]
        for character in " " + text:
            code = character.encode()
            ids += [index[code]] if code in index else [byte + 3 for byte in code]
        while True:
            best = max(((scores[index[pieces[a] + pieces[b]]], -i) for i, (a, b) in
                        enumerate(itertools.pairwise(ids))
                        if pieces[a] + pieces[b] in index), default=None)
            if best is None:
                return ids
            i = -best[1]
            ids[i:i + 2] = [index[pieces[ids[i]] + pieces[ids[i + 1]]]]

    for text in ("Once upon a time, Tim saw a dog.\n\"Hi!\" he said.", "  two  spaces ",
                 "naïve café 中文 €", "aaaaaaa the the theatre", "1984 <s"):
        assert tokenizer.encode(text).tolist() == encode(text), text
