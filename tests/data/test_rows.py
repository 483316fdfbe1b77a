"""Rows of data sets: local files, saved folders and repositories give the same documents."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants as hub_constants

from hippocampus.config import DataConfig
from hippocampus.data import rows
from hippocampus.data.corpora import open_corpus
from hippocampus.errors import DataError

# In the very form of WikiText's data set: a row is a line, an empty line is "".
TRAIN = ["", " = Valkyria = \n", "", " The game began in 2010 . \n", "", " = = Story = = \n",
         " A squad . \n", "", " = Tower <unk> = \n", "", " It is a building . \n"]
VALIDATION = ["", " = Lobster = \n", "", " A species @-@ rich genus . \n"]
TEST = ["", " = Robert = \n", " An actor . \n"]
ARTICLES = ["\n = Valkyria = \n\n The game began in 2010 . \n\n = = Story = = \n A squad . \n\n",
            " = Tower <unk> = \n\n It is a building . \n"]
WIKITEXT = {"document_start": "^ = [^=].* = $"}
CARD = """---
configs:
- config_name: wikitext-raw-v1
  data_files:
  - {split: train, path: raw/train-*}
  - {split: validation, path: raw/validation-*}
  - {split: test, path: raw/test-*}
- config_name: wikitext-v1
  data_files:
  - {split: train, path: words/train-*}
---
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and a cache of the library's own for each test."""
    import datasets

    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", str(tmp_path / "cache"))


def online(monkeypatch, endpoint):
    """A hub at another address."""
    import datasets

    for module in (hub_constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)


def parquet(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"number": range(len(texts)), column: texts}), path)
    return path


def repository(folder):
    parquet(folder / "raw/train-00000-of-00002.parquet", TRAIN[:5])
    parquet(folder / "raw/train-00001-of-00002.parquet", TRAIN[5:])
    parquet(folder / "raw/validation-00000-of-00001.parquet", VALIDATION)
    parquet(folder / "raw/test-00000-of-00001.parquet", TEST)
    parquet(folder / "words/train-00000-of-00001.parquet", ["a\n", "b\n", "c\n"])
    (folder / "README.md").write_text(CARD)
    return folder


def saved(folder):
    import datasets

    datasets.DatasetDict({
        name: datasets.Dataset.from_dict({"text": texts}) for name, texts in
        (("train", TRAIN), ("validation", VALIDATION), ("test", TEST))}).save_to_disk(str(folder))
    return folder


def files(folder, suffix):
    folder.mkdir()
    for name, texts in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            parquet(path, texts)
        else:
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"corpus": str(folder / f"train.{suffix}"),
            "validation_files": str(folder / f"validation.{suffix}"),
            "test_files": str(folder / f"test.{suffix}")}


FORMS = {
    "repository": lambda folder: {"corpus": str(repository(folder)), "subset": "wikitext-raw-v1"},
    "save_to_disk": lambda folder: {"corpus": str(saved(folder))},
    "parquet": lambda folder: files(folder, "parquet"),
    "jsonl": lambda folder: files(folder, "jsonl"),
}


def documents(split, **fields):
    return list(open_corpus(DataConfig(**fields)).documents(split))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_wikitext_gives_the_same_articles(tmp_path, form):
    fields = {**FORMS[form](tmp_path / "set"), **WIKITEXT}
    corpus = open_corpus(DataConfig(**fields))
    assert corpus.splits == ("train", "validation", "test")
    assert list(corpus.documents("train")) == ARTICLES
    assert "".join(corpus.documents("validation")) == "\n = Lobster = \n\n A species @-@ rich " \
        "genus . \n"
    assert list(corpus.documents("test")) == ["\n = Robert = \n An actor . \n"]
    assert open_corpus(DataConfig(**fields)).digest == corpus.digest


@pytest.mark.parametrize("form", FORMS)
def test_without_a_heading_every_row_that_is_not_blank_is_a_document(tmp_path, form):
    fields = FORMS[form](tmp_path / "set")
    assert documents("train", **fields) == [text for text in TRAIN if text]


def test_streamed_repository_holds_out_its_beginning(tmp_path, monkeypatch):
    import datasets

    from hippocampus.data import corpora

    monkeypatch.setattr(corpora, "STREAMED_VALIDATION_DOCUMENTS", 2)
    builder = datasets.load_dataset_builder(str(repository(tmp_path / "set")), "wikitext-v1")
    streams = builder.as_streaming_dataset()
    table = rows.Table("set", tuple(streams), "digest", rows._slicer("set", streams), True)
    corpus = corpora._from_table(table, DataConfig())
    assert list(corpus.documents("validation")) == ["a\n", "b\n"]
    assert list(corpus.documents("train")) == ["c\n"]
    with pytest.raises(DataError, match="cannot be streamed"):
        table.open("train[:1]")


def test_hub_data_set_in_the_library_cache_is_read_without_a_network(tmp_path, monkeypatch):
    import datasets

    builder = datasets.load_dataset_builder(
        str(repository(tmp_path / "wikitext")), "wikitext-raw-v1")
    builder.download_and_prepare()
    (tmp_path / "datasets/wikitext").rename(tmp_path / "datasets/Salesforce___wikitext")
    assert documents("train", corpus="Salesforce/wikitext", subset="wikitext-raw-v1",
                     **WIKITEXT) == ARTICLES


def test_splits_may_be_slices(tmp_path):
    folder = parquet(tmp_path / "set/train.parquet", [str(i) for i in range(10)]).parent
    fields = {"corpus": str(folder), "train_split": "train[:70%]",
              "validation_split": "train[70%:]"}
    assert documents("train", **fields) == list("0123456")
    assert documents("validation", **fields) == list("789")


def test_slices_of_a_saved_data_set(tmp_path):
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": list("0123456789")}).save_to_disk(str(folder))
    fields = {"corpus": str(folder), "train_split": "train[:-2]", "validation_split": "train[-2:]"}
    assert documents("train", **fields) == list("01234567")
    assert documents("validation", **fields) == list("89")


def test_last_tenth_of_the_documents_is_held_out(tmp_path):
    path = parquet(tmp_path / "x.parquet", ["", *(f"row {i}" for i in range(25))])
    assert len(documents("train", corpus=str(path))) == 22
    assert documents("validation", corpus=str(path)) == ["row 22", "row 23", "row 24"]


def test_one_document_cannot_be_held_out(tmp_path):
    path = parquet(tmp_path / "x.parquet", ["only one"])
    with pytest.raises(DataError, match="has 1 documents"):
        documents("validation", corpus=str(path))


@pytest.mark.parametrize("form", FORMS)
def test_digest_follows_the_text_the_column_and_the_cuts(tmp_path, form, monkeypatch):
    first = FORMS[form](tmp_path / "one")
    plain = open_corpus(DataConfig(**first)).digest
    assert open_corpus(DataConfig(**first, **WIKITEXT)).digest != plain
    monkeypatch.setattr(sys.modules[__name__], "TRAIN", [*TRAIN, "more\n"])
    assert open_corpus(DataConfig(**FORMS[form](tmp_path / "two"))).digest != plain


def test_repository_changed_in_place_is_read_anew(tmp_path):
    path = parquet(tmp_path / "set/train.parquet", ["old"] * 10)
    fields = {"corpus": str(path.parent)}
    before = open_corpus(DataConfig(**fields)).digest
    times = path.stat()
    parquet(path, ["new"] * 10)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert set(documents("train", **fields)) == {"new"}
    assert open_corpus(DataConfig(**fields)).digest != before


@pytest.mark.parametrize("form", FORMS)
def test_missing_column_is_an_error_that_names_those_there(tmp_path, form):
    fields = FORMS[form](tmp_path / "set")
    with pytest.raises(DataError, match=r"no column 'body'; it has: .*text") as caught:
        documents("train", **fields, column="body")
    assert "data.column" in caught.value.hint


def test_column_without_text_is_an_error(tmp_path):
    path = parquet(tmp_path / "x.parquet", ["a", "b"])
    with pytest.raises(DataError, match=r"'number' .* holds int64, not text"):
        documents("train", corpus=str(path), column="number")


def test_column_of_another_name(tmp_path):
    path = parquet(tmp_path / "x.parquet", list("abcdefghij"), column="story")
    assert documents("train", corpus=str(path), column="story") == list("abcdefghi")


@pytest.mark.parametrize("subset", ["", "wikitext-v9"])
def test_unknown_or_missing_subset_is_an_error_that_names_them(tmp_path, subset):
    with pytest.raises(DataError, match="no such subset") as caught:
        documents("train", corpus=str(repository(tmp_path / "set")), subset=subset)
    assert "wikitext-raw-v1" in caught.value.hint
    assert "wikitext-v1" in caught.value.hint


@pytest.mark.parametrize("form", ["repository", "save_to_disk"])
@pytest.mark.parametrize("field", ["train_split", "validation_split", "test_split"])
def test_unknown_split_is_an_error_that_names_them(tmp_path, form, field):
    with pytest.raises(DataError, match="no split 'dev'") as caught:
        open_corpus(DataConfig(**FORMS[form](tmp_path / "set"), **{field: "dev"}))
    assert caught.value.hint == "it has: train, validation, test"


def test_empty_split_is_an_error(tmp_path):
    path = parquet(tmp_path / "x.parquet", ["", None, "  "])
    with pytest.raises(DataError, match=r"train split of .* has no text"):
        documents("train", corpus=str(path), validation_files=str(path))


def test_parquet_that_is_not_utf8_is_an_error_that_names_the_byte(tmp_path):
    offsets = pa.py_buffer(b"\0\0\0\0\4\0\0\0\x10\0\0\0")
    array = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"finecaf\xe9 au lait"))
    pq.write_table(pa.table({"text": array}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="byte 0xe9 at offset 3 of a row"):
        documents("train", corpus=str(tmp_path / "x.parquet"),
                  validation_files=str(tmp_path / "x.parquet"))


def test_jsonl_that_is_not_utf8_is_an_error_that_names_the_byte(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="byte 0xe9 at offset 13"):
        documents("train", corpus=str(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(("name", "content"), [
    ("x.jsonl", b'{"text": \n'), ("x.parquet", b"PAR1 is not all it takes"), ("x.jsonl", b"")])
def test_damaged_file_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        documents("train", corpus=str(tmp_path / name), validation_files=str(tmp_path / name))
    assert "\n" not in caught.value.message
    assert name in caught.value.message


def test_damaged_saved_folder_is_one_line(tmp_path):
    folder = saved(tmp_path / "set")
    for path in (folder / "train").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        documents("train", corpus=str(folder))


def test_offline_hub_is_an_error_at_once():
    began = time.monotonic()
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set") as caught:
        open_corpus(DataConfig(corpus="Salesforce/wikitext", subset="wikitext-103-v1"))
    assert time.monotonic() - began < 5
    assert "local files" in caught.value.hint


def test_unreachable_hub_is_found_out_in_seconds_and_the_flags_are_put_back(monkeypatch):
    online(monkeypatch, "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9 cannot be reached"):
        open_corpus(DataConfig(corpus="Salesforce/wikitext"))
    assert time.monotonic() - began < 10
    assert hub_constants.HF_HUB_OFFLINE is False


def test_hub_that_never_answers_is_given_up(monkeypatch):
    class Silent(BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(1)

    server = HTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    online(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(rows, "HUB_TIMEOUT_SECONDS", 0.2)
    try:
        with pytest.raises(DataError, match="cannot be reached"):
            open_corpus(DataConfig(corpus="Salesforce/wikitext"))
    finally:
        server.shutdown()
        server.server_close()


def test_rows_are_never_all_in_memory(tmp_path):
    path = tmp_path / "big.parquet"
    texts = [f"{i} " + hashlib.sha256(b"%d" % i).hexdigest() * 12 for i in range(2500)]
    with pq.ParquetWriter(path, pa.schema({"text": pa.string()})) as writer:
        for _ in range(80):
            writer.write_table(pa.table({"text": texts}), row_group_size=500)
    script = (
        "import resource, sys\n"
        "from hippocampus.config import DataConfig\n"
        "from hippocampus.data.corpora import open_corpus\n"
        "def total(path):\n"
        "    corpus = open_corpus(DataConfig(corpus=path, validation_files=path))\n"
        "    return sum(map(len, corpus.documents('train')))\n"
        "total(sys.argv[1])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(total(sys.argv[2]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n")
    small = parquet(tmp_path / "small.parquet", texts[:1000])
    run = subprocess.run(
        [sys.executable, "-c", script, str(small), str(path)], capture_output=True, text=True,
        check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    total, grown = map(int, run.stdout.split())
    assert total > 150e6
    assert grown < 80_000  # kilobytes
