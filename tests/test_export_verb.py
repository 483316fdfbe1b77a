"""The export verb: what it prints, what it makes, and what it refuses."""

import json
import shutil

import pytest
import tiny_run

import hippocampus.evaluate
import hippocampus.export
import hippocampus.sample
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.exports.folder import FILES


@pytest.fixture(scope="module")
def run():
    return tiny_run.trained()


def export(run, out, *flags: str) -> None:
    hippocampus.export.main([f"--workdir={run}", f"--out={out}", *flags])


def test_int8_prints_size_and_bits_per_byte_before_and_after(run, tmp_path, capsys):
    export(run, tmp_path / "out", "--quantize=int8")
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line.split()}
    assert lines["bits/byte"][1] == "6.1178" and lines["bits/byte"][2] != "6.1178"
    assert lines["size"][1:6] == ["27.8", "kB", "12.4", "kB", "-55.3%"]
    assert "tiny step 12, running average weights: 6,942 parameters" in printed
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_without_the_corpus_the_export_says_so_and_is_made(run, tmp_path, capsys):
    moved = shutil.copytree(run, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["corpus"] = "/nowhere/text.txt"
    (moved / "config.json").write_text(json.dumps(config))
    export(moved, tmp_path / "out", "--dtype=bfloat16")
    printed = capsys.readouterr().out
    assert "there is no file /nowhere/text.txt" in " ".join(printed.split())
    assert "bits/byte" not in printed
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "Bits per byte were not measured" in card and "nowhere" not in card


def test_an_export_is_sampled_from_and_evaluated_like_its_run(run, tmp_path, capsys):
    export(run, tmp_path / "out", "--step=12")
    capsys.readouterr()
    texts = []
    for folder in (run, tmp_path / "out"):
        hippocampus.sample.main([f"--workdir={folder}", "--prompt=the ", "--max_new_tokens=8"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    hippocampus.evaluate.main([f"--workdir={tmp_path / 'out'}", f"--out={tmp_path}"])
    (found,) = tmp_path.glob("validation-*.json")
    content = json.loads(found.read_text())
    results = json.loads((run / "results.json").read_text())
    assert content["rows"][-1]["nats_per_token"] == results["final/loss"]
    assert [row["weights"] for row in content["rows"]] == [None] * 4 + ["ema"]
    with pytest.raises(ConfigError, match="is an export of the ema weights"):
        hippocampus.evaluate.main([f"--workdir={tmp_path / 'out'}", "--weights=raw"])


def test_another_text_than_the_training_s_is_refused_for_an_export_too(run, tmp_path):
    export(run, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    content["export"]["text"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="is not the text that"):
        hippocampus.evaluate.main([f"--workdir={tmp_path / 'out'}", f"--out={tmp_path / 'e'}"])


def test_an_earlier_export_is_replaced_only_when_asked(run, tmp_path):
    export(run, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is an export already"):
        export(run, tmp_path / "out", "--weights=raw")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    export(run, tmp_path / "out", "--weights=raw", "--overwrite")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(("flags", "error", "words"), [
    (["--step=3"], CheckpointError, "has no step 3"),
    (["--quantize=int4"], ConfigError, "--quantize"),
    (["--quantize=int8", "--dtype=bfloat16"], ConfigError, "choose one"),
    (["--weights=both"], ConfigError, "--weights")])
def test_bad_requests_are_refused_and_nothing_is_written(run, tmp_path, flags, error, words):
    with pytest.raises(error, match=words):
        export(run, tmp_path / "out", *flags)
    assert not list(tmp_path.iterdir())


def test_folders_that_are_no_run_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="no run folder at"):
        export(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty and not an export"):
        export(run, run)
    export(run, tmp_path / "out")
    with pytest.raises(ConfigError, match="is an exported model already"):
        export(tmp_path / "out", tmp_path / "again")


def test_a_run_without_an_average_is_exported_raw(run, tmp_path):
    plain = shutil.copytree(run, tmp_path / "run")
    config = json.loads((plain / "config.json").read_text())
    config["ema"]["decay"] = 0.0
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="keeps no average") as caught:
        export(plain, tmp_path / "out")
    assert caught.value.hint == "--weights=raw"
    export(plain, tmp_path / "out", "--weights=raw")
