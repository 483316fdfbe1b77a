"""The small files of a run folder, damaged: one line, or what is left of them."""

import json
import shutil

import pytest
import tiny_run

from hippocampus.config_files import to_json
from hippocampus.errors import DataError
from hippocampus.exports.run_records import RunRecords
from hippocampus.generation.loading import load
from hippocampus.runs.run_folder import RunFolder, cut_metrics, read_metrics
from hippocampus.training.resume import check_same_data

NO_OBJECTS = {"empty": b"", "bytes": bytes(range(256)), "null": b"null", "list": b"[]",
              "text": b'"x"', "deep": b"[" * 200_000, "torn": b'{"sha256": "a',
              "digits": b"9" * 5000}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What loading reads before it comes to the weights."""
    from hippocampus.data.tokenizers import byte_tokenizer

    folder = RunFolder(tmp_path_factory.mktemp("run") / "run")
    folder.path.mkdir()
    folder.config.write_text(to_json(tiny_run.config()))
    byte_tokenizer().save(folder.tokenizer)
    return folder


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
@pytest.mark.parametrize("name", ["data.json", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_run_that_is_opened_is_one_line_that_names_it(
        run, tmp_path, name, content):
    folder = shutil.copytree(run.path, tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert name in caught.value.message and len(caught.value.message.splitlines()) == 1
    assert caught.value.hint


@pytest.mark.parametrize("content", NO_OBJECTS.values(), ids=NO_OBJECTS)
def test_damaged_records_are_empty(tmp_path, content):
    for name in ("env.json", "data.json", "results.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(content)
    records = RunRecords.of(RunFolder(tmp_path))
    assert not (records.environment or records.data or records.results or records.metrics)


@pytest.mark.parametrize("saved", [None, [], 3, "x"])
def test_a_record_of_the_text_that_is_none_is_a_data_error(tmp_path, saved):
    with pytest.raises(DataError, match=r"data\.json is damaged"):
        check_same_data(RunFolder(tmp_path), saved, {"sha256": "a", "tokenizer": "b"})


@pytest.mark.parametrize("rest", [b'{"step": 3, "tr', b"\xff\xfe\x80\n", b"\0" * 999, b"[1]\n",
                                  b"3\nnull\n", b'{"step": "x"}\n', b"[" * 200_000 + b"\n"])
def test_rows_of_metrics_before_a_torn_or_foreign_line_are_kept(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": None}]
    path.write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode() + rest)
    assert read_metrics(path) == rows
    cut_metrics(path, 1)
    assert path.read_text() == json.dumps(rows[0]) + "\n"
