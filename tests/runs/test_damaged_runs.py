"""Whole runs whose checkpoints changed on disk, or that somebody else uses, by the command line."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.runs.run_folder import read_metrics


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path) -> None:
    path.unlink()


HARMS = {
    "optimizer/d/*": (flip, r"optimizer/d/\w+: digest differs"),
    "ema/ocdbt.process_0/d/*": (truncate, r"ema/ocdbt\.process_0/d/\w+ is \d+ bytes, not \d+"),
    "params/d/*": (delete, r"params/d/\w+ is missing")}


def harm(run: Path, step: int, pattern: str) -> str:
    """Changes a file of a step; returns what is to be said of it."""
    how, words = HARMS[pattern]
    how(sorted((run / "steps" / str(step)).glob(pattern))[0])
    return rf"checkpoint {step} is damaged \({words}\)"


def content(folder: Path, *but: str) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but}


def saved(run: Path) -> dict[int, float | None]:
    with Checkpoints(run / "steps") as checkpoints:
        return checkpoints.losses()


@pytest.fixture
def run(tmp_path) -> Path:
    return shutil.copytree(tiny_run.uninterrupted(), tmp_path / "run")


@pytest.mark.parametrize("pattern", HARMS)
def test_run_with_a_damaged_newest_step_goes_on_from_the_one_before_and_ends_with_the_same_bits(
        run, pattern):
    *_, before, newest = saved(run)
    said = harm(run, newest, pattern)
    harmed = content(run / "steps" / str(newest))
    printed = tiny_run.finish(run)
    assert re.search(rf"^{said}; using {before}$", printed, re.MULTILINE), printed
    assert printed.count("is damaged") == 1
    assert f"going on from step {before}\n" in printed
    tiny_run.assert_same_run(run, tiny_run.uninterrupted())
    assert content(run / "steps" / f"{newest}.damaged") == harmed


def test_run_without_a_good_step_is_refused_every_time_and_keeps_all(run):
    steps = list(saved(run))
    for step in steps[:-2]:
        shutil.rmtree(run / "steps" / str(step))
    older, newest = steps[-2:]
    lines = [harm(run, newest, "params/d/*") + rf"; using {older}",
             harm(run, older, "optimizer/d/*") + "; there is none before it"]
    harmed = {step: content(run / "steps" / str(step)) for step in (older, newest)}
    others = content(run, ".lock", "env.json")
    others = {name: held for name, held in others.items() if not name.startswith("steps/")}

    for attempt in range(2):
        done = tiny_run.run(tiny_run.command(run, **tiny_run.LONG))
        assert done.returncode == 66, done.stderr
        first, hint = done.stderr.splitlines()[-2:]
        assert first.startswith("error: no checkpoint in ") and hint.startswith("hint: ")
        assert f"{older}.damaged" in first and f"{newest}.damaged" in first
        found = [line for line in done.stdout.splitlines() if "is damaged" in line]
        assert len(found) == (0 if attempt else 2)
        assert all(re.fullmatch(line, shown) for line, shown in zip(lines, found, strict=False))
        assert {path.name for path in (run / "steps").iterdir()} == {
            f"{older}.damaged", f"{newest}.damaged"}
        for step, before in harmed.items():
            assert content(run / "steps" / f"{step}.damaged") == before
        left = content(run, ".lock", "env.json")
        assert {name: held for name, held in left.items()
                if not name.startswith("steps/")} == others


def test_evaluate_and_sample_take_the_next_best_step_with_a_line(run, tmp_path):
    losses = {step: loss for step, loss in saved(run).items() if loss is not None}
    best, second = sorted(losses, key=losses.get)[:2]
    said = harm(run, best, "params/d/*") + f"; using {second}"
    before = content(run / "steps")
    evaluated, sampled = (tiny_run.run([
        sys.executable, "-m", f"hippocampus.{verb}", f"--workdir={run}", *flags])
        for verb, flags in (("evaluate", [f"--out={tmp_path / 'out'}"]),
                            ("sample", ["--prompt=the ", "--max_new_tokens=2"])))
    for done in (evaluated, sampled):
        assert done.returncode == 0, done.stderr
        assert len(re.findall(said, done.stdout + done.stderr)) == 1, done.stdout + done.stderr
    table = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert table["step"] == second
    assert sampled.stdout.startswith("the ")
    assert content(run / "steps") == before, "a reader changed a checkpoint"


# Says how long it took from the imports, which any start needs, to the exit.
TIMED = """import atexit, sys, time
from hippocampus.training import loop
from hippocampus.train import main
from hippocampus.verbs import run_verb
begin = time.monotonic()
atexit.register(lambda: print("seconds", time.monotonic() - begin))
run_verb(main)
"""


def test_second_process_is_refused_at_once_with_the_name_of_the_first(tmp_path):
    command = tiny_run.command(tmp_path / "run", **tiny_run.LONG)
    first = subprocess.Popen(tiny_run.slowly(command, 0.5), stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL, env=tiny_run.environment())
    try:
        tiny_run.wait_for(lambda: bool(read_metrics(tmp_path / "run" / "metrics.jsonl")), first)
        second = tiny_run.run([sys.executable, "-c", TIMED, *command[3:]])
        assert second.returncode == 64
        assert second.stderr.splitlines() == [
            f"error: {tmp_path / 'run'} is in use by process {first.pid} on {socket.gethostname()}",
            "hint: wait for it, or choose another --workdir"]
        assert float(second.stdout.split("seconds ")[1]) < 1
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        # What the dead one has left does not keep anybody out.
        third = subprocess.Popen(command, stdout=subprocess.PIPE, text=True,
                                 stderr=subprocess.DEVNULL, env=tiny_run.environment())
        try:
            tiny_run.wait_for(lambda: f"process {third.pid} on" in (
                tmp_path / "run" / ".lock").read_text(), third)
        finally:
            third.kill()
            third.communicate()
    finally:
        first.kill()
        first.wait()
