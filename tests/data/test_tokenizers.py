"""Tokenizers: exact round trips, the library's own ids, and files that the library reads."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import normalizers

from hippocampus.data.documents import Piece
from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe, library_words
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


def words(*kept):
    vocabulary = {word: i for i, word in enumerate(("<unk>", "<eos>", *kept))}
    return Tokenizer(library_words(vocabulary).to_str())


@pytest.fixture(scope="module")
def bpe():
    library = library_bpe()
    library.train_from_iterator(["the cat sat on the mat, it's 12 éé\n"] * 9,
                                bpe_trainer(300, False))
    return Tokenizer(library.to_str())


def test_line_end_is_a_word_and_words_outside_the_vocabulary_are_unknown():
    tokenizer = words("a", "cat")
    assert tokenizer.kind == "words"
    assert tokenizer.encode("a  cat \n\n dog\ta").tolist() == [2, 3, 1, 1, 0, 2]
    assert tokenizer.encode("<unk> <eos>").tolist() == [0, 1]
    assert (tokenizer.unknown_id, tokenizer.end_id) == (0, None)


@given(text=st.text(st.sampled_from("ab<unk>eos \n\r\t\x1c\x85\xa0\u2028é")))
def test_words_are_those_of_the_library(text):
    tokenizer = words("a", "b", "ab", "é", "<", "<unk>a")
    assert tokenizer.encode(text).tolist() == library_ids(tokenizer, text)


def test_decoded_words_have_spaces_between_and_give_the_same_ids():
    tokenizer = words("the", "cat", ".")
    ids = tokenizer.encode("the cat .\nthe dog\n")
    assert tokenizer.decode(ids) == " the cat .\n the <unk>\n"
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids.tolist()
    pieces = "".join(tokenizer.decode([i]) for i in ids)
    assert pieces == tokenizer.decode(ids)


def test_document_of_words_ends_with_its_line():
    tokenizer = words("a", "b")
    assert tokenizer.encode("a\nb").tolist() == [2, 1, 3]
    assert tokenizer.encode_document("a\nb").tolist() == [2, 1, 3, 1]
    assert tokenizer.encode_document("a\nb\n").tolist() == [2, 1, 3, 1]


def test_bpe_round_trips_any_text(bpe):
    assert bpe.kind == "bpe"
    assert bpe.vocab_size < 300
    assert bpe.decode(bpe.encode(AWKWARD)) == AWKWARD
    assert len(bpe.encode("the cat sat on")) == 4


def test_document_begins_with_its_marker_and_quoted_markers_are_text(bpe):
    assert bpe.end_id == 0
    text = "the <|endoftext|> cat"
    ids = bpe.encode_document(text)
    assert (ids == bpe.end_id).tolist() == [True] + [False] * (len(ids) - 1)
    assert bpe.decode(ids[1:]) == text
    assert (bpe.encode(text) == bpe.end_id).sum() == 1  # what a person types may mean it


def test_bytes_are_those_of_the_text_without_markers(bpe):
    assert bpe.count_bytes(bpe.encode_document("the éé")) == len("the éé".encode())


@pytest.mark.parametrize("name", ["bpe", "words"])
def test_learned_tokenizer_is_saved_and_recognised(name, bpe, tmp_path):
    tokenizer = bpe if name == "bpe" else words("a", "b")
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.digest) == (name, tokenizer.digest)
    library = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode("a b the").ids == tokenizer.encode("a b the").tolist()


@pytest.mark.parametrize("name", ["bpe", "words"])
def test_learned_tokenizer_with_another_part_is_left_to_the_library(name, bpe):
    tokenizer = bpe if name == "bpe" else words("a", "b")
    library = LibraryTokenizer.from_str(tokenizer.to_json())
    library.normalizer = normalizers.Lowercase()
    other = Tokenizer(library.to_str())
    assert other.kind == "other"
    assert other.encode("A the").tolist() == library.encode("a the").ids


def of_characters(**changes) -> str:
    """The document of a tokenizer of the characters a, b and the space, changed."""
    content = json.loads(character_tokenizer("ab ").to_json())
    content["model"]["vocab"].update(changes.pop("vocab", {}))
    return json.dumps({**content, **changes})


CUT = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
PAD = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 99,
       "pad_type_id": 0, "pad_token": "a"}


@pytest.mark.parametrize("part", [{"truncation": CUT}, {"padding": PAD}])
def test_a_tokenizer_that_cuts_or_pads_reads_whole_texts_all_the_same(part):
    # Another normalizer: so that the library encodes.
    for other in ({}, {"normalizer": {"type": "NFC"}}):
        tokenizer = Tokenizer(of_characters(**part, **other))
        assert tokenizer.decode(tokenizer.encode("ab ab")) == "ab ab"
        piece, = tokenizer.encode_pieces([Piece("ab ab", True, True)])
        np.testing.assert_array_equal(piece, tokenizer.encode("ab ab"))
        assert piece.max() < tokenizer.vocab_size


@pytest.mark.parametrize(("vocab", "words"), [
    ({"c": 2**24}, "its ids go up to 16,777,216"), ({"c": 2**32 - 1}, "its ids go up to"),
    ({"c": 2**40}, "not a valid"), ({"c": -1}, "not a valid"), ({"c": 1.5}, "not a valid")])
def test_ids_that_no_model_can_have_are_refused(tmp_path, vocab, words):
    (tmp_path / "t.json").write_text(of_characters(vocab=vocab))
    with pytest.raises(DataError, match=words) as caught:
        Tokenizer.load(tmp_path / "t.json")
    assert str(tmp_path / "t.json") in caught.value.message and caught.value.hint


def test_a_tokenizer_without_tokens_is_refused():
    content = json.loads(of_characters())
    content["model"]["vocab"] = {}
    with pytest.raises(DataError, match="it has no tokens"):
        Tokenizer(json.dumps(content))


def test_ids_with_holes_need_a_model_that_has_the_highest():
    tokenizer = Tokenizer(of_characters(vocab={"c": 1000}))
    assert tokenizer.vocab_size == 1001 and tokenizer.encode("c").tolist() == [1000]


def test_what_the_library_fails_at_is_a_data_error():
    content = json.loads(of_characters(normalizer={"type": "NFC"}))
    with pytest.raises(DataError, match="the tokenizer cannot read the text"):
        Tokenizer(json.dumps(content)).encode("axb")
