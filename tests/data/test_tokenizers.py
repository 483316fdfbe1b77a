"""Tokenizers: exact round trips, the library's own ids, and files that the library reads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import normalizers

from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer
from hippocampus.errors import DataError

AWKWARD = "Grüße, 東京!\r\n\n\n\tA\u0301 \x00\x85\u2028 <unk> \U0001f469\u200d\U0001f680  end"
KINDS = ["bytes", "characters"]


def build_tokenizer(kind, text):
    return byte_tokenizer() if kind == "bytes" else character_tokenizer(text)


def library_ids(tokenizer, text):
    return LibraryTokenizer.from_str(tokenizer.to_json()).encode(text).ids


def test_id_of_a_byte_is_its_value():
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode(AWKWARD).tolist() == list(AWKWARD.encode())


def test_ids_of_characters_are_in_code_point_order():
    tokenizer = character_tokenizer("baca\n")
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("\nabc").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(min_size=1))
def test_text_survives_the_round_trip(kind, text):
    tokenizer = build_tokenizer(kind, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(min_size=1))
def test_numpy_path_gives_the_ids_of_the_library(kind, text):
    tokenizer = build_tokenizer(kind, text)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == library_ids(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_awkward_text_survives_the_round_trip(kind):
    tokenizer = build_tokenizer(kind, AWKWARD)
    assert tokenizer.decode(tokenizer.encode(AWKWARD)) == AWKWARD
    assert tokenizer.encode(AWKWARD).tolist() == library_ids(tokenizer, AWKWARD)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_text_has_no_ids(kind):
    tokenizer = build_tokenizer(kind, "a")
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.decode(tokenizer.encode("")) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_comes_back_with_kind_digest_and_ids(kind, tmp_path):
    tokenizer = build_tokenizer(kind, AWKWARD)
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert (loaded.kind, loaded.digest, loaded.to_json()) == (
        kind,
        tokenizer.digest,
        tokenizer.to_json(),
    )
    assert loaded.encode(AWKWARD).tolist() == tokenizer.encode(AWKWARD).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_read_by_the_library(kind, tmp_path):
    tokenizer = build_tokenizer(kind, AWKWARD)
    tokenizer.save(tmp_path / "tokenizer.json")
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.get_vocab_size() == tokenizer.vocab_size
    assert library.decode(library.encode(AWKWARD).ids) == AWKWARD


def test_digest_ignores_spacing_and_order_but_not_the_vocabulary():
    tokenizer = character_tokenizer("abc")
    content = json.loads(tokenizer.to_json())
    reordered = json.dumps(dict(reversed(content.items())))
    assert Tokenizer(reordered).digest == tokenizer.digest
    assert character_tokenizer("abd").digest != tokenizer.digest


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_with_another_part_is_left_to_the_library(kind):
    library = LibraryTokenizer.from_str(build_tokenizer(kind, "abc").to_json())
    library.normalizer = normalizers.Lowercase()
    tokenizer = Tokenizer(library.to_str())
    assert tokenizer.kind == "other"
    assert tokenizer.encode("ABC").tolist() == library.encode("abc").ids
    assert tokenizer.decode(tokenizer.encode("CAB")) == "cab"


def test_characters_may_have_their_ids_in_any_order():
    content = json.loads(character_tokenizer("abc").to_json())
    content["model"]["vocab"] = {"b": 0, "c": 1, "a": 2}
    tokenizer = Tokenizer(json.dumps(content))
    assert tokenizer.kind == "characters"
    assert tokenizer.encode("abc").tolist() == library_ids(tokenizer, "abc") == [2, 0, 1]


def test_bytes_that_are_not_text_become_replacement_characters():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([0xFF, 0x41]) == "\ufffdA"
    assert tokenizer.decode(list("🙂".encode()[:3])) == "\ufffd"


@pytest.mark.parametrize("text", ["abcXa", "abc\U0010ffffa"])
def test_unknown_character_is_an_error_that_names_it_and_its_place(text):
    tokenizer = character_tokenizer("abc")
    with pytest.raises(DataError) as caught:
        tokenizer.encode(text)
    assert f"{text[3]!r} at position 3" in caught.value.message
    assert "knows 3 characters" in caught.value.hint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [-1, 256])
def test_id_outside_the_vocabulary_is_an_error(kind, index):
    with pytest.raises(DataError, match=f"id {index} is outside"):
        build_tokenizer(kind, "abc").decode([1, index])


def test_lone_surrogate_is_an_error():
    with pytest.raises(DataError, match=r"lone surrogate.* at position 2"):
        byte_tokenizer().encode("ab\udc80")
    with pytest.raises(DataError, match=r"lone surrogate.* at position 2"):
        character_tokenizer("ab\udc80")


def test_no_characters_is_an_error():
    with pytest.raises(DataError, match="no characters"):
        character_tokenizer("")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*tokenizer\.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_directory_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": null}'])
def test_damaged_file_is_an_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged"):
        Tokenizer.load(tmp_path / "tokenizer.json")
