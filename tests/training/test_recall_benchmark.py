"""The recall benchmark: it goes on where it was stopped, and its table is of what was measured."""

import csv
import json
import subprocess
import sys

import pytest
import recall_run
import tiny_run

pytestmark = pytest.mark.full


def benchmark(folder, *flags, **changes):
    overrides = {**tiny_run.TINY, **{name.replace("__", "."): value for name, value in {
        **recall_run.COPY, "data__corpus": "recall:delayed_copy", **changes}.items()}}
    overrides.pop("name")
    file = folder / "copy.py"
    file.write_text("from hippocampus.config_files import defaults\n\n"
                    "def get_config(paths):\n    config = defaults()\n"
                    "    config.model.attention.window = 1 if paths == 'blind' else 0\n"
                    "    return config\n")
    given = [f"--config.{name}={value}" for name, value in overrides.items()]
    return subprocess.run(
        [sys.executable, str(tiny_run.ROOT / "benchmarks" / "recall.py"), f"--config={file}",
         "--models=seeing,blind", "--seeds=2", f"--out={folder / 'out'}", *flags, *given],
        capture_output=True, text=True, env=tiny_run.environment(), timeout=500)


def test_stopped_and_given_again_it_makes_the_table_of_all_runs(tmp_path):
    stopped = benchmark(tmp_path, "--minutes=0.02")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    done = benchmark(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["model"], row["kind"]) for row in rows] == [
        (model, kind) for model in ("seeing", "blind") for kind in ("6x1", "12x1", "24x1")]
    assert all(row["seeds"] == 2 and len(row["accuracies"]) == 2 for row in rows)
    assert rows[0]["accuracy_mean"] > 0.99 and rows[3]["accuracy_mean"] < 0.3
    for row in rows:
        model = json.loads((out / row["model"] / "seed_1" / "accuracy.json").read_text())
        assert row["accuracies"][1] == model["kinds"][row["kind"]]["accuracy"]
    assert len(list(csv.DictReader((out / "results.csv").open()))) == len(rows)
    assert "| seeing |" in (out / "results.md").read_text()
    again = benchmark(tmp_path)
    assert "4 of 4 runs are finished" in again.stdout and again.returncode == 0


def test_a_wrong_setting_is_refused_before_anything_starts(tmp_path):
    refused = benchmark(tmp_path, data__recall__pairs=(9,))
    assert refused.returncode != 0 and "does not fit into 6 tokens" in refused.stderr
    assert not (tmp_path / "out").exists()
