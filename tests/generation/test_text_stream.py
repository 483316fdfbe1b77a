"""From ids to text, piece by piece: characters stay whole, stop strings are seen in time."""

import functools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe, library_words
from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer
from hippocampus.generation.text_stream import TextStream

TEXT = "the cat sat on the mat .\nthe naïve dog ran to 日本 🦛 and home .\n"


def pieces_of(tokenizer, ids, stop=(), prompt=(), sizes=None):
    stream, pieces, begin = TextStream(tokenizer, list(prompt), stop), [], 0
    for size in sizes or [1] * len(ids):
        pieces.append(stream.push(ids[begin:begin + size]))
        begin += size
    pieces.append(stream.push(ids[begin:]))
    pieces.append(stream.finish())
    return pieces, stream


@pytest.mark.parametrize("text", ["naïve 日本語 🦛!", "plain", "🦛🦛"])
def test_a_character_of_many_tokens_is_streamed_whole(text):
    tokenizer = byte_tokenizer()
    pieces, stream = pieces_of(tokenizer, tokenizer.encode(text).tolist())
    pieces = [piece for piece in pieces if piece]
    assert "".join(pieces) == stream.text == text and all(len(piece) == 1 for piece in pieces)


@given(st.binary(max_size=24))
@settings(max_examples=300, deadline=None)
def test_bytes_that_are_no_text_come_out_as_the_whole_text_has_them(data):
    tokenizer = byte_tokenizer()
    pieces, _ = pieces_of(tokenizer, list(data))
    assert "".join(pieces) == tokenizer.decode(list(data))


def test_bytes_that_are_no_text_do_not_hold_up_the_stream():
    stream = TextStream(byte_tokenizer(), [])
    pieces = [stream.push([index]) for index in [0xFF] * 8]
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * 5


@functools.cache
def tokenizer_of(kind) -> Tokenizer:
    if kind == "words":
        words = dict.fromkeys(["<unk>", "<eos>", *TEXT.split()])
        return Tokenizer(library_words({word: i for i, word in enumerate(words)}).to_str())
    if kind == "bpe":
        library = library_bpe()
        library.train_from_iterator([TEXT] * 8, bpe_trainer(300, False))
        return Tokenizer(library.to_str())
    return byte_tokenizer() if kind == "bytes" else character_tokenizer(TEXT)


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "bpe"])
def test_a_continuation_keeps_the_space_in_front_of_its_first_word(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXT).tolist()
    whole = tokenizer.decode(ids)
    for at in range(1, len(ids), 3):
        start = tokenizer.decode(ids[:at])
        if start.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        pieces, _ = pieces_of(tokenizer, ids[at:], prompt=ids[:at])
        assert start + "".join(pieces) == whole


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "bpe"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_how_ids_are_grouped_changes_nothing(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(TEXT).tolist()
    stop = data.draw(st.lists(st.sampled_from(
        ["mat", " .\n", "日本", "🦛", "zzz", "the d", "o ho"]), max_size=3))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=20))
    one, together = pieces_of(tokenizer, ids, stop), pieces_of(tokenizer, ids, stop, sizes=sizes)
    assert "".join(one[0]) == "".join(together[0]) == one[1].text == together[1].text
    assert (one[1].n_tokens, one[1].stopped) == (together[1].n_tokens, together[1].stopped)
    whole = tokenizer.decode(ids)
    found = [whole.find(text) for text in stop if text in whole]
    assert one[1].stopped == bool(found)
    if found and kind in ("bytes", "characters"):
        assert one[1].text == whole[:min(found)]
    assert not any(text in one[1].text for text in stop)


def test_what_could_become_a_stop_string_waits_until_it_is_none():
    stream = TextStream(character_tokenizer("abcdX\n"), [], ("abc", "\n\n"))
    encode = character_tokenizer("abcdX\n").encode
    assert stream.push(encode("Xab").tolist()) == "X"
    assert stream.push(encode("a").tolist()) == "ab"
    assert stream.push(encode("b").tolist()) == ""
    assert stream.push(encode("d\n").tolist()) == "abd"
    assert stream.finish() == "\n"


def test_a_stop_string_ends_the_text_and_counts_the_tokens_that_made_it():
    tokenizer = character_tokenizer("abcd")
    for sizes in ([6], [1] * 6, [3, 3]):
        pieces, stream = pieces_of(tokenizer, tokenizer.encode("dabcda").tolist(), ("bc",),
                                   sizes=sizes)
        assert "".join(pieces) == "da" and stream.stopped and stream.n_tokens == 4
        assert stream.push([0]) == stream.finish() == ""


def test_the_stop_string_that_begins_first_counts():
    tokenizer = character_tokenizer("abcd")
    _, stream = pieces_of(tokenizer, tokenizer.encode("abcd").tolist(), ("d", "bc"))
    assert stream.text == "a"


def test_the_prompt_is_neither_text_nor_part_of_a_stop_string():
    tokenizer = byte_tokenizer()
    pieces, stream = pieces_of(tokenizer, list(b"b ab"), ("ab",), prompt=list(b"xa"))
    assert "".join(pieces) == "b " and stream.stopped
