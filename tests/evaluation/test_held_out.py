"""What metrics are divided by: bytes, words and unknown ids of the predicted text."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_run

from hippocampus.data.corpora import open_corpus
from hippocampus.data.shards import token_split
from hippocampus.data.vocabularies import build_tokenizer
from hippocampus.errors import DataError
from hippocampus.evaluation.held_out import read_text, take_split

TRAIN = "the cat sat on the mat\nthe élan of a dog \N{SNOWMAN}\n" * 20
VALIDATION = ["the cat sat on the élan\n\na dog", "the mat\n", "\N{SNOWMAN} the xylophone sat\n"]
"""Documents; the last has a word and characters that training lacks."""


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    (tmp_path / "train.txt").write_text(TRAIN, encoding="utf-8")
    for i, text in enumerate(VALIDATION):
        (tmp_path / f"validation{i}.txt").write_text(text, encoding="utf-8")
    return {"data__corpus": str(tmp_path / "train.txt"),
            "data__validation_files": str(tmp_path / "validation*.txt")}


def validation(files, packed=False, **changes):
    data = tiny_run.config(**files, **changes).data
    corpus = open_corpus(data)
    tokenizer = build_tokenizer(data, corpus)
    split = token_split(corpus, tokenizer, "validation")
    return take_split(corpus.name, corpus.digest, "validation", split, tokenizer, packed)


ALL = "".join(VALIDATION)
LINES = 5  # one of them without a line end
WORDS = sum(len(text.split()) for text in VALIDATION) + LINES


@pytest.mark.parametrize(("tokenizer", "first_bytes"), [("bytes", 1), ("characters", 1),
                                                        ("words", len(" the"))])
def test_bytes_are_those_of_the_text_but_the_first_token(files, tokenizer, first_bytes):
    text = validation(files, data__tokenizer=tokenizer)
    assert text.n_bytes == len(ALL.encode()) - first_bytes
    assert text.n_words == WORDS
    assert text.bytes_per_token * text.predictions == pytest.approx(text.n_bytes)
    assert text.words_per_token * text.predictions == pytest.approx(WORDS)


def test_end_of_text_in_front_of_documents_is_predicted_and_has_no_bytes(files):
    text = validation(files, data__tokenizer="bpe", data__vocab_size=270)
    end = text.tokenizer.end_id
    assert (text.ids == end).sum() == len(VALIDATION) and text.ids[0] == end
    assert text.n_bytes == len(ALL.encode()) and text.n_words == WORDS
    assert text.predictions == len(text.ids) - 1


def test_unknown_words_are_a_share_of_the_ids(files):
    text = validation(files, data__tokenizer="words")
    assert text.predictions + 1 == WORDS  # words and <eos> are the tokens
    assert text.n_unknown == 1 and text.unknown_rate == 1 / WORDS
    assert validation(files).unknown_rate == 0


def test_documents_are_kept_apart_only_when_packed(files):
    assert validation(files).document_starts is None
    starts = validation(files, packed=True).document_starts
    assert starts.tolist() == np.cumsum([0, *(len(t.encode()) for t in VALIDATION[:-1])]).tolist()
    windows = validation(files, packed=True).windows(64, 0, 2)
    assert next(iter(windows)).document_ids_BT.max() == 3


@pytest.mark.parametrize("tokenizer", [
    {"data__tokenizer": "bytes"}, {"data__tokenizer": "characters"}, {"data__tokenizer": "words"},
    {"data__tokenizer": "bpe", "data__vocab_size": 270}], ids=lambda t: t["data__tokenizer"])
def test_file_is_read_as_a_split_of_one_document(files, tmp_path, tokenizer):
    path = tmp_path / "validation0.txt"
    split = validation({**files, "data__validation_files": str(path)}, **tokenizer)
    text = read_text(path, split.tokenizer)
    assert np.array_equal(text.ids, split.ids)
    for name in ("n_bytes", "n_words", "n_unknown", "document_starts"):
        assert getattr(text, name) == getattr(split, name)
    assert text.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (text.name, text.split) == ("validation0.txt", "text")


def test_character_that_the_tokenizer_lacks_is_named(files, tmp_path):
    tokenizer = validation(files, data__tokenizer="characters").tokenizer
    (tmp_path / "text.txt").write_text("the caté")
    read_text(tmp_path / "text.txt", tokenizer)
    (tmp_path / "text.txt").write_text("the cat!")
    with pytest.raises(DataError, match="the character '!' at position 7"):
        read_text(tmp_path / "text.txt", tokenizer)


def test_wikitext_validation_has_its_217646_words(tinyshakespeare_path):
    path = Path(os.path.dirname(tinyshakespeare_path)) / "wikitext-2" / "wiki.valid.tokens"
    if not path.is_file():
        pytest.skip(f"no {path}")
    data = tiny_run.config(data__corpus=str(path), data__tokenizer="words").data
    text = read_text(path, build_tokenizer(data, open_corpus(data)))
    assert text.n_words == text.predictions + 1 == 217_646
    assert text.n_bytes < path.stat().st_size
