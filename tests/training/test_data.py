"""What a run reads: splits, batches as the config asks for them, and recognising them again."""

import dataclasses
import json

import numpy as np
import pytest

from hippocampus.config_files import defaults, load_config
from hippocampus.data.batches import ShuffledWindows, Streams
from hippocampus.errors import ConfigError, DataError
from hippocampus.runs.run_folder import RunFolder
from hippocampus.training import data as training_data
from hippocampus.training.data import read_data, with_steps

TEXT = "".join(f"# {i}\nthe cat sat on mat {i % 7}, é\n" for i in range(200))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function overrides -> (data, config) of a small text with documents and a test split."""
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    for name, text in (("train", TEXT), ("valid", TEXT[:900]), ("test", TEXT[900:1500])):
        (tmp_path / f"{name}.txt").write_text(text)

    def make(**changes):
        given = {
            "data.corpus": str(tmp_path / "train.txt"), "data.context": 16,
            "data.validation_files": str(tmp_path / "valid.txt"),
            "data.test_files": str(tmp_path / "test.txt"), "data.document_start": "^# ",
            **{name.replace("__", "."): value for name, value in changes.items()}}
        config = load_config(defaults(), given)
        return read_data(config), config

    return make


def test_splits_have_the_ids_of_their_texts(read):
    data, _ = read()
    assert data.train_ids.tolist() == list(TEXT.encode())
    assert data.validation_ids.tolist() == list(TEXT[:900].encode())
    assert data.test.ids.tolist() == list(TEXT[900:1500].encode())


def test_test_split_is_tokenized_only_when_asked_for(read, monkeypatch):
    seen, real = [], training_data.token_split
    monkeypatch.setattr(training_data, "token_split",
                        lambda *a: (seen.append(a[-1]), real(*a))[1])
    data, _ = read()
    assert seen == ["train", "validation"]
    assert data.test is data.test
    assert seen == ["train", "validation", "test"]


def test_corpus_without_a_test_split_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.txt").write_text(TEXT)
    assert read_data(load_config(defaults(), {"data.corpus": str(tmp_path / "x.txt"),
                                              "data.context": 16})).test is None


@pytest.mark.parametrize("kind", ["bytes", "characters", "words", "bpe"])
def test_bytes_per_token_are_those_of_what_is_predicted(read, kind):
    data, _ = read(data__tokenizer=kind, sample__prompt="the")
    text, ids = TEXT[:900], data.validation_ids
    first = {"bytes": 1, "characters": 1, "words": 2, "bpe": 0}[kind]  # " #", <|endoftext|>
    assert data.bytes_per_token == pytest.approx((len(text.encode()) - first) / (len(ids) - 1))


def test_order_and_documents_are_as_the_config_says(read):
    data, config = read()
    batches = data.batches(config)
    assert isinstance(batches, ShuffledWindows)
    assert batches.batch(0).document_ids_BT is None
    data, config = read(data__order="streams", data__documents="packed", train__batch_size=4)
    batches = data.batches(config)
    assert isinstance(batches, Streams)
    batch = batches.batch(0)
    assert batch.document_ids_BT.max() > 1
    assert batch.reset_B.all()
    starts = np.flatnonzero(np.diff(batch.document_ids_BT[0])) + 1
    assert (batch.loss_weight_BT[0, starts - 1] == 0).all()


def test_marked_documents_predict_the_next_marker(read):
    data, config = read(data__tokenizer="bpe", data__documents="packed", sample__prompt="the")
    batch = data.batches(config).batch(0)
    assert batch.document_ids_BT.max() > 1
    assert (batch.loss_weight_BT == 1).all()
    starts = np.diff(batch.document_ids_BT[0], prepend=1) > 0
    assert (batch.tokens_BT[0][starts] == data.tokenizer.end_id).all()


def test_windows_of_an_epoch_are_known_before_there_is_a_model(read):
    data, config = read()
    assert data.batches(config).windows_per_epoch == len(data.train_ids) // 16 - 1


def test_bpe_that_stops_early_is_noted(read):
    data, _ = read(data__tokenizer="bpe", sample__prompt="the")
    assert f"stopped at {data.tokenizer.vocab_size} of 32,768" in data.note
    assert read()[0].note == ""


def test_text_shorter_than_a_window_is_an_error(read):
    with pytest.raises(DataError, match="need at least"):
        read(data__context=100_000)


@pytest.mark.parametrize(("field", "words"), [("sha256", "another text"),
                                              ("tokenizer", "another tokenizer")])
def test_run_on_another_text_or_tokenizer_is_refused_by_both_hashes(read, tmp_path, field, words):
    data, _ = read()
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.data.write_text(data.record())
    data.check_same_as(folder)
    saved = json.loads(data.record())
    folder.data.write_text(json.dumps({**saved, field: "0123456789abcdef"}))
    with pytest.raises(ConfigError, match=words) as caught:
        data.check_same_as(folder)
    assert "0123456789ab" in caught.value.message
    assert saved[field][:12] in caught.value.message


@pytest.mark.parametrize(("changes", "words"), [
    ({"data__tokenizer": "byte"}, "did you mean bytes"),
    ({"data__tokenizer": "word piece"}, "must be one of bytes, characters, words, bpe"),
    ({"data__vocab_size": 300}, "no meaning for data.tokenizer = bytes"),
    ({"data__tokenizer": "bpe", "data__vocab_size": 256}, "less than 257"),
    ({"data__tokenizer": "words", "data__vocab_size": 2}, "less than 3"),
    ({"data__document_start": "(["}, "not a regular expression"),
    ({"data__validation_files": ""}, "without data.validation_files"),
    ({"data__documents": "apart"}, "joined, packed"),
    ({"data__order": "random"}, "shuffled, streams"),
])
def test_fields_that_do_not_fit_are_refused(read, changes, words):
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize("epochs", [0.5, 1.0, 3.0])
def test_epochs_become_steps_as_soon_as_the_text_is_read(read, epochs):
    data, config = read(train__epochs=epochs, train__batch_size=4)
    steps = with_steps(config, data).train.steps
    windows = data.batches(config).windows_per_epoch
    assert 4 * (steps - 1) < epochs * windows <= 4 * steps
    assert with_steps(dataclasses.replace(config, train=dataclasses.replace(
        config.train, epochs=0.0)), data).train.steps == config.train.steps != steps


def test_epochs_of_more_steps_than_can_be_counted_are_refused(read, monkeypatch):
    data, config = read(train__epochs=1e6, train__batch_size=1)
    with_steps(config, data)
    monkeypatch.setattr(ShuffledWindows, "windows_per_epoch", 3000)
    with pytest.raises(ConfigError, match=r"train\.epochs = 1e\+06 is 3,000,000,000 steps"):
        with_steps(config, data)
