"""From ids to text, piece by piece: characters stay whole, stop strings are seen in time."""

import functools

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers

from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe, library_words
from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer
from hippocampus.generation.text_stream import TextStream

TEXT = "the cat sat on the mat .\nthe naïve dog ran to 日本 🦛 and home .\n"
KINDS = ["bytes", "characters", "words", "bpe", "byte fallback"]


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


def test_tokens_that_end_one_character_and_begin_the_next_give_whole_characters():
    pieces, _ = pieces_of(across_characters(), [0, 1, *[2] * 20, 3, 6])
    assert pieces == ["", *["€"] * 22, "b", "", ""]


@given(st.lists(st.integers(0, 6), max_size=40), st.lists(st.integers(1, 9), min_size=1))
@settings(max_examples=200, deadline=None)
def test_characters_across_tokens_come_out_as_the_whole_text_has_them(ids, sizes):
    tokenizer = across_characters()
    one, together = pieces_of(tokenizer, ids), pieces_of(tokenizer, ids, sizes=sizes)
    assert "".join(one[0]) == "".join(together[0]) == tokenizer.decode(ids)


def test_characters_of_byte_tokens_come_out_whole_behind_others_of_byte_tokens():
    tokenizer = tokenizer_of("byte fallback")
    text = "日本語€ the 🦛🦛é日"
    pieces, _ = pieces_of(tokenizer, tokenizer.encode(text).tolist())
    assert "".join(pieces) == text and max(map(len, pieces)) <= 2  # " t" is one token


def test_a_byte_that_is_no_text_stands_alone_between_byte_tokens():
    tokenizer = tokenizer_of("byte fallback")
    ids = [*"日本".encode(), 0xFF, *tokenizer.encode("the").tolist(), *"日".encode()]
    pieces, _ = pieces_of(tokenizer, ids)
    assert "".join(pieces) == "日本\N{REPLACEMENT CHARACTER} the日"


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
    if kind == "byte fallback":
        return byte_fallback()
    return byte_tokenizer() if kind == "bytes" else character_tokenizer(TEXT)


def byte_fallback() -> Tokenizer:
    """As SentencePiece's: the first space of a text goes, unknown characters are byte tokens."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += dict.fromkeys(["<unk>", *(c for c in TEXT if c.isascii() and c != " "), "▁", "▁t"])
    library = LibraryTokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "t")],
        unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])
    return Tokenizer(library.to_str())


@functools.cache
def across_characters() -> Tokenizer:
    """Byte-level tokens that end one character and begin the next, as large vocabularies have."""
    tokens = [b"\xe2\x82", b"\xac\xe2", b"\x82\xac\xe2", b"\x82\xac", b"\xe2", b"a\xe2\x82", b"b"]
    names = ["".join(byte_tokenizer()._library.id_to_token(byte) for byte in token)
             for token in tokens]
    library = LibraryTokenizer(models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=[]))
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library.to_str())


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
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
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in one[0] + together[0])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_ids_give_the_same_text_however_they_are_grouped(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    prompt = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    stop = data.draw(st.lists(st.sampled_from(["a", " t", "\N{REPLACEMENT CHARACTER}", "e\n"]),
                              max_size=2))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=20))
    one = pieces_of(tokenizer, ids, stop, prompt)
    together = pieces_of(tokenizer, ids, stop, prompt, sizes)
    assert "".join(one[0]) == "".join(together[0]) == one[1].text == together[1].text
    assert (one[1].n_tokens, one[1].stopped) == (together[1].n_tokens, together[1].stopped)


def test_the_work_for_a_token_does_not_grow_with_the_text():
    class Counting(Tokenizer):
        longest = 0

        def decode(self, ids):
            self.longest = max(self.longest, len(ids))
            return super().decode(ids)

    tokenizer = Counting(byte_tokenizer().to_json())
    pieces_of(tokenizer, [0x61] * 200 + [0xFF] * 200 + list("日本🦛é".encode() * 20), ("aab",))
    assert tokenizer.longest < 24


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
