"""kill -9 of one of several processes, and other devices at the next start: the same bits."""

import functools
import random
import re
import time
from pathlib import Path

import processes
import pytest
import tiny_run
from processes import codes, started, train, wait

from hippocampus.runs.run_folder import read_metrics

# Without a sum over four devices, whose order depends on the processes: see test_processes.py.
RUN = {"train__steps": 40, "log__every_steps": 1, "eval__every_steps": 10, "mesh__fsdp": 2,
       "mesh__sequence": 2, "model__dropout": 0.1, "checkpoint__every_steps": 3,
       "checkpoint__keep_latest": 100, "sample__max_new_tokens": 1}


@functools.cache
def never_killed() -> Path:
    """Four devices of one process."""
    workdir = tiny_run.folder() / "never_killed"
    (alone,) = train(workdir, 1, 4, RUN)
    assert alone.popen.returncode == 0, alone.stderr[-5:]
    return workdir


def kill_one(workdir: Path, n: int) -> None:
    """Trains on n processes of four devices and kills one of them, after some more steps."""
    commands = [tiny_run.slowly(command, 0.05) for command in processes.commands(
        workdir, n, processes.free_port(), RUN)]
    with started(commands, 4 // n, HIPPOCAMPUS_HEARTBEAT_SECONDS="5") as all_of_them:
        first, victim = all_of_them[0], random.choice(all_of_them)
        wanted = random.choice(("begins to save ", "step "))
        tiny_run.wait_for(
            lambda: sum(line.startswith(wanted) for line in first.stdout) >= 2, first.popen, 150)
        time.sleep(random.uniform(0, 0.2))
        victim.popen.kill()
        wait(all_of_them, seconds=60)
    assert all(code not in (0, 64, 66) for code in codes(all_of_them)), first.stderr
    assert len(read_metrics(workdir / "metrics.jsonl")) < RUN["train__steps"]


def finish(workdir: Path, n: int, n_devices: int, **changes) -> list[str]:
    """Trains to the end; returns what was printed."""
    found = train(workdir, n, n_devices, {**RUN, **changes})
    assert codes(found) == [0] * n, found[0].stderr[-5:]
    return found[0].stdout


@pytest.mark.full
@pytest.mark.parametrize(("killed", "last"), [((2, 2), 2), ((1, 2), 4)])
def test_run_of_which_one_process_is_killed_ends_as_if_never_killed(tmp_path, killed, last):
    # Four devices over these numbers of processes, one start after the other.
    for n in killed:
        kill_one(tmp_path / "run", n)
    finish(tmp_path / "run", last, 4 // last)
    tiny_run.assert_same_run(tmp_path / "run", never_killed())


# Trains, and says what it saves and what it restores, bit by bit.
TOLD = """import sys
sys.path.insert(0, TESTS)
from tiny_run import digest
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.train import main
from hippocampus.verbs import run_verb
start, restore = Checkpoints._start, Checkpoints.restore_newest
def told(self, step, trees, loss):
    print("saves", step, digest(trees), flush=True)
    return start(self, step, trees, loss)
def restored(self, *rest, **options):
    found = restore(self, *rest, **options)
    if found is not None:
        print("restores", found[0], digest(found[1]), flush=True)
    return found
Checkpoints._start, Checkpoints.restore_newest = told, restored
run_verb(main)
""".replace("TESTS", repr(str(tiny_run.ROOT / "tests")))


@pytest.mark.full
def test_other_number_of_devices_restores_the_same_bits_and_differs_by_rounding_only(tmp_path):
    changes = {**RUN, "optimizer__schedule": "constant", "eval__every_steps": 0,
               "checkpoint__every_steps": 1000}
    devices = {4: {"mesh__fsdp": 2, "mesh__sequence": 2}, 1: {"mesh__fsdp": 1, "mesh__sequence": 1},
               2: {"mesh__fsdp": 2, "mesh__sequence": 1}}
    said: list[str] = []
    for (n, mesh), steps in zip(devices.items(), (7, 14, 20), strict=True):
        (command,) = processes.commands(tmp_path / "run", 1, 0, {
            **changes, **mesh, "train__steps": steps})
        with started([[command[0], "-c", TOLD, *command[3:]]], n) as (process,):
            wait([process])
        assert process.popen.returncode == 0, process.stderr[-5:]
        assert any(f"{n} x " in line for line in process.stdout)
        said += [line for line in process.stdout if re.match(r"(saves|restores) \d", line)]
    assert [line.split()[:2] for line in said] == [
        ["saves", "7"], ["restores", "7"], ["saves", "14"], ["restores", "14"], ["saves", "20"]]
    assert said[0].split()[1:] == said[1].split()[1:]
    assert said[2].split()[1:] == said[3].split()[1:]

    finish(tmp_path / "one", 1, 1, **{**changes, **devices[1], "train__steps": 20})
    losses = [[row["train/loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")
               if "train/loss" in row] for name in ("run", "one")]
    assert len(losses[1]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-5)
