"""Learned vocabularies: the same every time, from the training split alone, and kept."""

import json
from collections import Counter

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from hippocampus.config import DataConfig
from hippocampus.data import cache, vocabularies
from hippocampus.data.corpora import open_corpus
from hippocampus.data.shards import token_split
from hippocampus.data.tokenizers import Tokenizer
from hippocampus.data.vocabularies import bpe_shortfall, build_tokenizer
from hippocampus.errors import DataError

TRAIN = "the cat sat .\nthe dog sat <unk>\nthe cat ran\n" * 30
VALIDATION = "the bird sat ~\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.txt").write_text(TRAIN)
    (tmp_path / "valid.txt").write_text(VALIDATION)
    return {"corpus": str(tmp_path / "train.txt"), "validation_files": str(tmp_path / "valid.txt")}


def build(files, **fields):
    data = DataConfig(**files, **fields)
    corpus = open_corpus(data)
    return build_tokenizer(data, corpus), corpus, data


def vocabulary(tokenizer):
    return LibraryTokenizer.from_str(tokenizer.to_json()).get_vocab()


def test_words_are_those_of_the_training_split_by_falling_frequency(files):
    tokenizer, corpus, _ = build(files, tokenizer="words")
    counts = Counter(TRAIN.split())
    ranked = sorted(counts.keys() - {"<unk>"}, key=lambda word: (-counts[word], word))
    assert vocabulary(tokenizer) == {w: i for i, w in enumerate(["<unk>", "<eos>", *ranked])}
    split = token_split(corpus, tokenizer, "validation")
    assert (split.n_unknown, split.n_words, len(split.ids)) == (2, 5, 5)


def test_only_the_most_frequent_words_are_kept(files):
    tokenizer, *_ = build(files, tokenizer="words", vocab_size=4)
    assert vocabulary(tokenizer) == {"<unk>": 0, "<eos>": 1, "the": 2, "cat": 3}
    assert tokenizer.vocab_size == 4


def test_characters_of_every_split_are_known(files):
    tokenizer, corpus, _ = build(files, tokenizer="characters")
    assert vocabulary(tokenizer).keys() == set(TRAIN + VALIDATION)
    token_split(corpus, tokenizer, "validation")


def test_bpe_is_the_same_in_every_build_and_has_every_byte(files):
    first, *_ = build(files, tokenizer="bpe", vocab_size=265)
    for path in (cache.cache_folder() / "tokenizers").glob("*.json"):
        path.unlink()
    again, *_ = build(files, tokenizer="bpe", vocab_size=265)
    assert again.to_json() == first.to_json()
    assert first.vocab_size == 265
    assert first.decode(first.encode("\0ÿ東")) == "\0ÿ東"
    merges = [tuple(pair) for pair in json.loads(first.to_json())["model"]["merges"]]
    assert merges[0] == ("a", "t")  # of cat and sat


def test_bpe_that_stops_early_says_what_it_was_asked_for_and_what_it_reached(files):
    tokenizer, _, data = build(files, tokenizer="bpe", vocab_size=5000)
    line = bpe_shortfall(data, tokenizer)
    assert f"stopped at {tokenizer.vocab_size} of 5,000" in line
    full, _, data = build(files, tokenizer="bpe", vocab_size=260)
    assert bpe_shortfall(data, full) == ""


@pytest.mark.parametrize("kind", ["words", "bpe", "characters"])
def test_tokenizer_is_kept_by_text_and_settings(files, monkeypatch, kind, tmp_path):
    size = {} if kind == "characters" else {"vocab_size": 259}
    first, *_ = build(files, tokenizer=kind, **size)
    with monkeypatch.context() as patch:
        patch.setattr(vocabularies, "_learn", lambda *_: pytest.fail("it was learned again"))
        assert build(files, tokenizer=kind, **size)[0].digest == first.digest
    (tmp_path / "train.txt").write_text("quite another text ^\n" * 30)
    assert build(files, tokenizer=kind, **size)[0].digest != first.digest
    assert len(list((cache.cache_folder() / "tokenizers").glob("*.json"))) == 2


def test_damaged_copy_is_made_again(files):
    first, *_ = build(files, tokenizer="words")
    [path] = (cache.cache_folder() / "tokenizers").glob("*.json")
    path.write_text(first.to_json()[:50])
    assert build(files, tokenizer="words")[0].digest == first.digest
    assert Tokenizer.load(path).digest == first.digest


def test_only_the_beginning_of_a_long_text_is_learned_from(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "long.txt"
    path.write_text("early word\n" * 100_000 + "late\n" * 100_000)
    known = vocabulary(build({"corpus": str(path)}, tokenizer="words", tokenizer_megabytes=1)[0])
    assert "early" in known
    assert "late" not in known
    known = vocabulary(build({"corpus": str(path)}, tokenizer="words", tokenizer_megabytes=2)[0])
    assert "late" in known


def test_any_tokenizer_json_is_used_as_it_is(files, tmp_path):
    made, *_ = build(files, tokenizer="bpe", vocab_size=262)
    made.save(tmp_path / "mine.json")
    tokenizer, corpus, _ = build(files, tokenizer=str(tmp_path / "mine.json"))
    assert tokenizer.digest == made.digest
    assert token_split(corpus, tokenizer, "train").ids[0] == made.end_id


def test_missing_tokenizer_json_is_an_error(files):
    with pytest.raises(DataError, match="no tokenizer at"):
        build(files, tokenizer="nowhere/tokenizer.json")
