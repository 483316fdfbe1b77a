"""The probe verb on a real run: its flags, its files, and what it refuses before it measures."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import hippocampus.probe
from hippocampus.errors import ConfigError, DataError
from hippocampus.probing.results import read_suites
from hippocampus.probing.suites import SUITES

SCRIPTS = sorted((tiny_run.ROOT / "probes").glob("*.py"))


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A folder with two suites, one after the other, and what the verb printed of the first."""
    out = tmp_path_factory.mktemp("probes")
    flags = [f"--workdir={tiny_run.trained()}", f"--out={out}", "--max_windows=16"]
    hippocampus.probe.main([*flags, "--suite=shuffle,segments", "--seed=3"])
    hippocampus.probe.main(flags, "paths")
    return out


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_suites_that_ran_before_stay_in_the_results(probed):
    assert [result.suite for result, _ in read_suites(probed, tuple(SUITES))] == [
        "paths", "shuffle"]
    found = {row["name"]: row for row in rows(probed)}
    assert {"baseline", "unigram", "only_hop", "only_attn_raw", "shuffle_hop",
            "shuffle_attn_batch"} <= set(found)
    assert (found["only_hop"]["seed"], found["shuffle_hop"]["seed"]) == ("0", "3")
    assert {row["context"] for row in found.values()} == {"16"}
    assert float(found["baseline"]["delta"]) == 0


def test_files_name_their_pictures_and_what_made_them(probed):
    content = json.loads((probed / "paths.json").read_text())
    assert content["format"] == 1 and content["about"]["config"] == "tiny"
    assert content["about"]["run"] == str(tiny_run.trained())
    for plot in content["plots"]:
        assert (probed / plot["file"]).read_text().startswith("<svg")


def test_a_run_without_out_has_its_probes_in_its_own_folder(tmp_path, capsys, monkeypatch):
    import shutil

    run = shutil.copytree(tiny_run.trained(), tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["probe.py", "--suite=segments"])
    hippocampus.probe.main([f"--checkpoint={run}", "--suite=segments", "--max_windows=8"])
    printed = capsys.readouterr().out
    assert "segments: left out, the model was trained with one segment" in printed
    assert "tokens predicted; average weights" in printed
    assert str(run / "probes" / "results.csv") in printed
    assert (run / "probes" / "results.csv").read_text().startswith("name,category,path,layer,loss")


@pytest.mark.parametrize(("error", "message", "flags"), [
    (ConfigError, "there is no suite 'path'", ["--suite=path"]),
    (ConfigError, "--max_windows is -1", ["--max_windows=-1"]),
    (ConfigError, "--seed is -1", ["--seed=-1"]),
    (ConfigError, "invalid choice: 'both'", ["--weights=both"]),
    (DataError, "has no test split", ["--split=test"]),
    (ConfigError, "memory is not for .* a model of the hybrid family", ["--suite=paths,memory"]),
])
def test_what_cannot_be_probed_is_refused_before_anything_is_measured(
        error, message, flags, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        hippocampus.probe.main([f"--workdir={tiny_run.trained()}", f"--out={out}", *flags])
    assert not out.exists() or not any(out.iterdir())


def test_help_names_every_suite(capsys):
    with pytest.raises(SystemExit):
        hippocampus.probe.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ", ".join(SUITES) in printed


def test_there_is_a_script_for_every_suite(monkeypatch):
    asked = []
    monkeypatch.setattr(hippocampus.probe, "main", lambda arguments, suite="": asked.append(suite))
    for path in SCRIPTS:
        text = path.read_text()
        assert len(text.splitlines()) <= 15 and f"python probes/{path.name} --checkpoint=" in text
        spec = importlib.util.spec_from_file_location("__main__", path)
        with pytest.raises(SystemExit) as ended:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert ended.value.code == 0
    assert sorted(asked) == sorted(SUITES)


@pytest.mark.full
def test_a_script_is_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, tiny_run.ROOT / "probes/path_ablation.py", "--max_windows=8",
         f"--checkpoint={tiny_run.trained()}", f"--out={tmp_path}"], capture_output=True, text=True,
        env=tiny_run.environment(), timeout=120, check=True)
    assert "only_hop" in done.stdout and (tmp_path / "results.csv").exists()
