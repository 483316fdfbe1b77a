"""Documents as they stream by: the same pieces however they come, and nothing lost."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hippocampus.data import documents
from hippocampus.data.documents import Piece, count, cut, group_lines, join, select, whole
from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe

HEADING = re.compile("^ = [^=].* = $")
TEXTS = st.lists(st.text("ab \n\t\r.,'1é", min_size=1, max_size=60), max_size=8)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARACTERS", 16)


@given(texts=TEXTS, sizes=st.lists(st.integers(1, 30), min_size=1))
def test_pieces_depend_on_the_documents_and_not_on_how_they_come(texts, sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARACTERS", 16)
        at_once = list(cut((True, text) for text in texts))
        chunks = []
        for text in texts:
            place = 0
            while place < len(text):
                size = sizes[len(chunks) % len(sizes)]
                chunks.append((place == 0, text[place : place + size]))
                place += size
        assert list(cut(chunks)) == at_once
        assert list(join(at_once)) == texts
        assert all(len(piece.text) <= 16 for piece in at_once)


def test_pieces_are_cut_behind_words_and_say_where_documents_begin_and_end(small_pieces):
    pieces = list(cut([(True, "one two  three four\nfive"), (True, "six")]))
    assert pieces == [Piece("one two  three", True, False), Piece(" four\nfive", False, True),
                      Piece("six", True, True)]


def test_text_without_white_space_is_cut_anywhere(small_pieces):
    assert [p.text for p in cut([(True, "x" * 40)])] == ["x" * 16, "x" * 16, "x" * 8]


@given(text=st.text(st.sampled_from("ab12.,'s \n\t\u2003é東\r"), max_size=400))
def test_bpe_of_the_pieces_is_bpe_of_the_document(text):
    library = library_bpe()
    library.train_from_iterator(["ab ab  12.\n\na's é ab\r\n ab"] * 9, bpe_trainer(290, False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_CHARACTERS", 20)
        pieces = [piece.text for piece in cut([(True, text)])]
    if all(re.search(r"\S[ \n]", text[i : i + 20]) for i in range(len(text) - 20)):
        ids = [i for piece in pieces for i in library.encode(piece).ids]
        assert ids == library.encode(text).ids


def test_headings_begin_documents_and_every_line_is_kept():
    lines = [" \n", " = One = \n", " \n", " a b \n", " = = Part = = \n", " = Two = \n", " c "]
    found = ["".join(text) for text in join(cut(group_lines(lines, HEADING)))]
    assert found == [" \n = One = \n \n a b \n = = Part = = \n", " = Two = \n c "]


def test_text_before_the_first_heading_is_a_document():
    assert list(group_lines(["hello\n", " = One = \n"], HEADING)) == [
        (True, "hello\n"), (True, " = One = \n")]


@pytest.mark.parametrize("lines", [[], ["\n", " \n"]])
def test_blank_lines_alone_are_no_document(lines):
    assert list(group_lines(lines, HEADING)) == []


def test_long_document_comes_in_chunks(monkeypatch):
    monkeypatch.setattr(documents, "_CHUNK_CHARACTERS", 10)
    lines = [" = One = \n", *["some line\n"] * 5, "\n", " = Two = \n"]
    chunks = list(group_lines(lines, HEADING))
    assert len(chunks) > 3
    assert count(iter(chunks)) == 2
    assert list(join(cut(chunks))) == ["".join(lines[:-1]), lines[-1]]


def test_blank_rows_are_left_out():
    assert list(whole(["a", "", None, " \n", "b"])) == [(True, "a"), (True, "b")]


def test_selected_documents_keep_all_their_chunks():
    chunks = [(True, "a"), (True, "b"), (False, "c"), (True, "d")]
    assert list(select(iter(chunks), 1, 2)) == [(True, "b"), (False, "c")]
    assert list(select(iter(chunks), 1, None)) == chunks[1:]
