"""kill -9 at any moment, most of all inside a save: the run ends bit for bit as if never killed."""

import random
import re
import statistics
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from hippocampus.runs.manifest import has_manifest
from hippocampus.runs.run_folder import read_metrics
from hippocampus.runs.step_folders import committed, is_committed


@dataclass
class Started:
    """A run that goes on in a process, and the lines that it has printed so far."""

    process: subprocess.Popen
    lines: list[str] = field(default_factory=list)

    def begun(self) -> int:
        """Saves that have begun."""
        return sum(line.startswith("begins to save ") for line in self.lines)


def start(command: list[str]) -> Started:
    started = Started(subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT, env=tiny_run.environment()))
    threading.Thread(target=lambda: started.lines.extend(started.process.stdout),
                     daemon=True).start()
    return started


def usual_seconds_of_a_save(command: list[str]) -> float:
    """Trains to the end; how long a save took from its begin to its manifest."""
    done = tiny_run.run(tiny_run.slowly(command, 0))
    assert done.returncode == 0, done.stderr
    return statistics.median(map(float, re.findall(r"saved \d+ in (\S+) s", done.stdout)))


def unfinished(workdir: Path) -> set[tuple]:
    """What a save or a deletion that was killed has left in steps/, told apart from earlier ones.

    A step that was killed between its commit and its manifest stays: it can be read.
    """
    steps = workdir / "steps"
    found = [path for path in (steps.iterdir() if steps.is_dir() else ())
             if not (path.name.isdecimal() and is_committed(path) and has_manifest(path))]
    return {(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@dataclass(frozen=True)
class Killer:
    """Starts a run and kills it at a random moment.

    Attributes:
      command: of the run.
      draw: what the moments are drawn from.
      save_seconds: what a save takes.
    """

    command: list[str]
    workdir: Path
    draw: random.Random
    save_seconds: float
    pause: float = 0.03

    def kill(self, where: str) -> bool:
        """Kills inside a "save", after some "steps", or while the run is "starting".

        Returns:
          Whether it fell inside a save.
        """
        before = unfinished(self.workdir)
        started = start(tiny_run.slowly(self.command, self.pause))
        try:
            self._wait(where, started)
            assert started.process.poll() is None
        except AssertionError as error:
            raise AssertionError(f"{error}\n{''.join(started.lines)}") from None
        finally:
            started.process.kill()
            started.process.wait()
        assert started.process.returncode == -9
        return bool(unfinished(self.workdir) - before)

    def _wait(self, where: str, started: Started) -> None:
        if where == "starting":
            time.sleep(self.draw.uniform(0.1, 3))
            return
        if where == "save":
            saves, before = self.draw.choice((1, 2)), unfinished(self.workdir)
            tiny_run.wait_for(lambda: started.begun() >= saves, started.process)
            # On a busy machine a save begins later than it says: wait until some of it is there.
            end = time.monotonic() + 2
            while not unfinished(self.workdir) - before and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(self.draw.uniform(0, 0.6) * self.save_seconds)
            return
        tiny_run.wait_for(lambda: any(line.startswith("step ") for line in started.lines),
                          started.process)
        time.sleep(self.draw.uniform(0, 10 * self.pause))


def kill_and_finish(workdir: Path, save_seconds: float, moments: list[str], command: list[str],
                    at_least: int) -> None:
    """Kills a run at moments, and more often inside saves until enough fell there; then ends it."""
    killer = Killer(command, workdir, random.Random(), save_seconds)
    inside = sum(killer.kill(where) for where in moments)
    for _ in range(len(moments)):
        if inside >= at_least:
            break
        inside += killer.kill("save")
    assert inside >= at_least, f"only {inside} kills fell inside a save"
    saved = committed(workdir / "steps")
    if saved:
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 14, "train/lo')
    done = tiny_run.run(command)
    assert done.returncode == 0, done.stderr
    assert ("going on from step " in done.stdout) == bool(saved)
    # A save that was killed is no damage: it is cleaned away without a word.
    assert all(path.name.isdecimal() and is_committed(path)
               for path in (workdir / "steps").iterdir())


def test_run_killed_three_times_most_often_inside_a_save_ends_as_if_never_killed(tmp_path):
    other = tiny_run.uninterrupted()
    command = tiny_run.command(tmp_path / "run", **{**tiny_run.LONG, "checkpoint__every_steps": 3})
    kill_and_finish(tmp_path / "run", 0.13, ["save", "steps", "save"], command, at_least=2)
    tiny_run.assert_same_run(tmp_path / "run", other)
    assert len(read_metrics(other / "metrics.jsonl")) == tiny_run.STEPS + 3


@pytest.mark.full
def test_run_killed_at_many_random_moments_ends_as_if_never_killed(tmp_path):
    # The killed run also deletes old steps, which the other does not: that is killed too.
    changes = {**tiny_run.LONG, "train__steps": 90}
    save_seconds = usual_seconds_of_a_save(tiny_run.command(tmp_path / "other", **changes))
    command = tiny_run.command(tmp_path / "run", **{
        **changes, "checkpoint__every_steps": 3, "checkpoint__keep_latest": 2})
    moments = ["save"] * 9 + ["steps"] * 2 + ["starting"] * 2
    random.shuffle(moments)
    kill_and_finish(tmp_path / "run", save_seconds, moments, command, at_least=7)
    tiny_run.assert_same_run(tmp_path / "run", tmp_path / "other")


SHAKESPEARE: dict[str, Any] = {
    "model__paths": ("ssm", "hopfield", "attention"), "model__n_layers": 2,
    "model__segments__train": 2, "model__segments__weights": (0.3, 1.0),
    "model__segments__eval": 2, "model__ssm__dominant_from_layer": 1, "model__token_noise": 0.03,
    "model__dropout": 0.2, "train__steps": 20, "log__every_steps": 1, "eval__every_steps": 5,
    "checkpoint__keep_latest": 100, "sample__every_steps": 0, "sample__max_new_tokens": 1}
"""All three paths and two passes of what else configs/shakespeare.py says, in a small size."""


@pytest.mark.full
def test_killed_run_of_the_shakespeare_system_ends_as_if_never_killed(tmp_path):
    def command(workdir: Path, **changes: Any) -> list[str]:
        config = f"--config={tiny_run.ROOT / 'configs' / 'shakespeare.py'}"
        return [config if flag.startswith("--config=") else flag
                for flag in tiny_run.command(workdir, **{**SHAKESPEARE, **changes})]

    save_seconds = usual_seconds_of_a_save(command(tmp_path / "other", checkpoint__every_steps=5))
    kill_and_finish(tmp_path / "run", save_seconds, ["save", "steps", "save"],
                    command(tmp_path / "run", checkpoint__every_steps=2), at_least=2)
    tiny_run.assert_same_run(tmp_path / "run", tmp_path / "other")
