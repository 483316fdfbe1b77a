"""A real ablation, tiny: what it leaves, and that stopping or killing it changes nothing."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from jax.experimental.compilation_cache import compilation_cache

from hippocampus.config_files import defaults
from hippocampus.data.batches import ShuffledWindows
from hippocampus.errors import ConfigError
from hippocampus.probing.ablation.grid import make_grid
from hippocampus.probing.ablation.study import carry_out, prepare
from hippocampus.probing.results import read_suite
from hippocampus.runs.run_folder import RunFolder, RunLock

OVER = "model.mlp.width=16,24"
CHANGES = {"train.steps": 12, "eval.every_steps": 4, "checkpoint.every_steps": 1000,
           "log.every_steps": 1, "sample.max_new_tokens": 1, "guard.patience": 2,
           "guard.max_rollbacks": 0}
TIMES = ("seconds", "commit", "version", "command", "devices", "trained_by", "run")


def overrides() -> dict:
    return {**tiny_run.TINY, "data.corpus": str(tiny_run.corpus()), **CHANGES}


def study(out: Path, over: str = OVER, seeds: int = 2, **changes):
    return prepare(make_grid(defaults(), {**overrides(), **changes}, [over], seeds), out)


@pytest.fixture(scope="module")
def quiet():
    return lambda line: None


@pytest.fixture(scope="module", autouse=True)
def compiled_for_all():
    """What one process of this module compiled, the others read, as all runs compile the same."""
    settings = {"jax_compilation_cache_dir": str(tiny_run.folder() / "compiled"),
                "jax_persistent_cache_min_compile_time_secs": 0,
                "jax_disable_most_optimizations": True}  # they take longer than the runs
    before = {name: getattr(jax.config, name, False) for name in settings}
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.clear_caches()  # a program of before this module is compiled in the other way
        if values is settings:
            yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quiet, compiled_for_all):
    """Trained in one go, by the verb; and what is read of it."""
    out = tmp_path_factory.mktemp("ablation") / "whole"
    finish(out)
    return out, carry_out(study(out), quiet)


def rows(out: Path, file: str) -> list[dict]:
    """Of a CSV file, without what depends on the clock and on who ran it."""
    with (out / file).open() as text:
        return [{name: value for name, value in row.items()
                 if not any(part in name for part in TIMES)} for row in csv.DictReader(text)]


def command(out: Path) -> list[str]:
    file = tiny_run.folder() / "base.py"
    file.write_text("from hippocampus.config_files import defaults\n\n"
                    "def get_config():\n    return defaults()\n")
    values = {name: ",".join(value) if isinstance(value, tuple) and value and isinstance(
        value[0], str) else value for name, value in overrides().items()}
    return [sys.executable, "-m", "hippocampus.ablate", f"--config={file}", f"--over={OVER}",
            "--seeds=2", f"--out={out}", *(f"--config.{n}={v}" for n, v in values.items())]


class Started:
    """The verb in a process of its own."""

    def __init__(self, arguments: list[str]):
        self.lines: list[str] = []
        self.process = subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, env={
                                            **tiny_run.environment(),
                                            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"})
        threading.Thread(target=lambda: self.lines.extend(self.process.stdout),
                         daemon=True).start()

    def after(self, words: str, number: int) -> None:
        """Waits for the nth line with the words."""
        tiny_run.wait_for(lambda: sum(words in line for line in self.lines) >= number,
                          self.process)

    def end(self, number: signal.Signals) -> int:
        """Sends a signal; returns the exit code."""
        os.kill(self.process.pid, number)
        return self.process.wait(timeout=60)


def finish(out: Path) -> None:
    """Goes on to the end, in a process like those that are stopped: they round alike."""
    done = Started(command(out))
    assert done.process.wait(timeout=120) == 0, "".join(done.lines)


def test_every_cell_is_a_run_folder_with_its_seed(uninterrupted):
    out, _ = uninterrupted
    for width in (16, 24):
        for seed in (0, 1):
            config = json.loads((out / f"width={width}" / f"seed_{seed}" /
                                 "config.json").read_text())
            assert (config["model"]["mlp"]["width"], config["train"]["seed"]) == (width, seed)
    assert json.loads((out / "grid.json").read_text())["seeds"] == [0, 1]


def test_the_files_hold_the_losses_of_the_runs(uninterrupted):
    out, done = uninterrupted
    cell = {row["cell"]: row for row in rows(out, "ablation.csv")}["width=16"]
    losses = [json.loads((out / "width=16" / f"seed_{seed}" / "results.json").read_text())[
        "final/loss"] for seed in (0, 1)]
    assert float(cell["loss_mean"]) == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert losses[0] != losses[1]
    assert [float(row["nats_per_token"]) for row in rows(out, "runs.csv")
            if row["cell"] == "width=16"] == losses
    result, about = read_suite(out / "ablation.json")
    assert [table.name for table in result.tables] == ["losses", "differences", "speed", "sizes"]
    assert about["seeds"] == [0, 1] and about["config"] == "tiny"
    assert [path.name for path in done.written] == ["ablation.csv", "runs.csv", "ablation.json",
                                                    "report.html"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "width=24" in page and "unigram" in page


@pytest.mark.full
def test_an_ablation_stopped_and_killed_ends_with_the_same_tables(uninterrupted, tmp_path):
    out = tmp_path / "out"
    stopped = Started(command(out))
    stopped.after("step  5/12", 1)
    assert stopped.end(signal.SIGTERM) == 75
    killed = Started(command(out))
    killed.after("step  5/12", 1)  # the first run is past it: in the middle of the second
    assert killed.end(signal.SIGKILL) == -9
    assert "going on from step" in "".join(killed.lines)
    done = [path.parent.name for path in out.glob("*/seed_*/results.json")]
    assert 1 <= len(done) < 4
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/seed_*/results.json")}
    finish(out)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # not trained again
    for file in ("ablation.csv", "runs.csv"):
        assert rows(out, file) == rows(uninterrupted[0], file)


def test_a_finished_ablation_is_read_and_not_trained(uninterrupted, quiet):
    out, _ = uninterrupted
    before = rows(out, "runs.csv")
    said: list[str] = []
    carry_out(study(out), said.append)
    assert said == [] and rows(out, "runs.csv") == before


def test_more_seeds_are_added_and_one_that_does_not_recover_stops_no_other(
        uninterrupted, tmp_path, quiet, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(uninterrupted[0], out)
    real = ShuffledWindows.batch

    def batch(self, step, rows=None):
        """The batches of the third seed are broken from the sixth step on."""
        made = real(self, step, rows)
        broken = self.seed == 2 and step > 4
        return made.replace(loss_weight_BT=made.loss_weight_BT * np.nan) if broken else made

    monkeypatch.setattr(ShuffledWindows, "batch", batch)
    result = carry_out(study(out, seeds=3), quiet).result
    assert result.notes == tuple(f"width={width}, seed 2: training did not recover; it is in no "
                                 "number" for width in (16, 24))
    assert rows(out, "runs.csv") == rows(uninterrupted[0], "runs.csv")
    assert json.loads((out / "grid.json").read_text())["seeds"] == [0, 1, 2]


@pytest.mark.full
def test_an_ablation_killed_at_random_moments_ends_with_the_same_tables(uninterrupted, tmp_path):
    out, draw = tmp_path / "out", random.Random()
    for _ in range(8):
        killed = Started(command(out))
        time.sleep(draw.uniform(0.5, 9))
        if killed.process.poll() is None:
            assert killed.end(signal.SIGKILL) == -9
    finish(out)
    for file in ("ablation.csv", "runs.csv"):
        assert rows(out, file) == rows(uninterrupted[0], file)


@pytest.mark.parametrize(("changes", "words"), [
    ({"optimizer.learning_rate": "0.02"}, "optimizer.learning_rate = 0.01, not 0.02"),
    ({"train.steps": "13"}, "train.steps = 12, not 13"),
    ({"eval.stride": "8"}, "eval.stride = 0, not 8"),
])
def test_another_config_in_the_same_folder_is_refused(uninterrupted, changes, words):
    with pytest.raises(ConfigError) as caught:
        study(uninterrupted[0], **changes)
    assert words in caught.value.message and "--out" in caught.value.hint


def test_what_changes_no_number_may_differ(uninterrupted):
    study(uninterrupted[0], **{"sample.max_new_tokens": "3", "log.every_steps": "5"})


def test_a_folder_of_something_else_or_in_use_is_refused(uninterrupted, tmp_path, quiet):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"not an ablation's folder \(it holds notes.txt\)"):
        carry_out(study(tmp_path), quiet)
    with pytest.raises(ConfigError, match="is a run folder"):
        carry_out(study(uninterrupted[0] / "width=16" / "seed_0"), quiet)
    with pytest.raises(ConfigError, match="is a file"):
        carry_out(study(tmp_path / "notes.txt"), quiet)
    lock = RunLock(RunFolder(uninterrupted[0]))
    with pytest.raises(ConfigError, match="is in use") as caught:
        carry_out(study(uninterrupted[0]), quiet)
    lock.release()
    assert "--out" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
