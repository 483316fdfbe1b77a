"""Full and vanished disks, and kills at any moment: what they cost is one save."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError, HippocampusError
from hippocampus.runs import step_folders
from hippocampus.runs.checkpoints import FAILURES_IN_A_ROW, Checkpoints, abstract
from hippocampus.runs.manifest import MANIFEST, has_manifest
from hippocampus.runs.orbax_step import OrbaxStep
from hippocampus.runs.step_folders import COMMITTED

KEEP_ALL = CheckpointConfig(keep_latest=100)
TREES = {"params": {"x": jax.random.normal(jax.random.key(0), (50_000,))}}  # 200 kB, not to shrink
LIKE = {name: abstract(tree) for name, tree in TREES.items()}


@contextlib.contextmanager
def files_of_at_most(size: int):
    """A disk that takes no more, for every user: the kernel ends the write of a longer file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.fixture
def small_disk(tmp_path):
    """2 MiB of memory as a disk, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here; the limit of a file's size stands in")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_whole(folder, step):
    with Checkpoints(folder) as checkpoints:
        assert has_manifest(folder / str(step)) and checkpoints.best_good(step) == step
        np.testing.assert_array_equal(
            checkpoints.restore(step, LIKE)["params"]["x"], TREES["params"]["x"])


# ---------------------------------------------------------------- full

def test_a_save_that_dies_of_a_full_disk_costs_that_save_and_no_other(tmp_path):
    lines: list[str] = []
    with Checkpoints(tmp_path, KEEP_ALL, lines.append) as checkpoints:
        assert checkpoints.save(1, TREES, 2.0)
        checkpoints.wait()
        with files_of_at_most(50_000):
            checkpoints.save(2, TREES, 1.0)
            checkpoints.wait()
        assert lines == ["warning: step 2 was not saved: File too large"]
        assert (checkpoints.steps, checkpoints.best, names(tmp_path)) == ([1], 1, ["1"])
        assert checkpoints.save(2, TREES, 1.0)  # the same number works again
        assert checkpoints.save(3, TREES, 3.0)
    assert_whole(tmp_path, 1)
    assert_whole(tmp_path, 2)
    assert len(lines) == 1


def test_a_failed_save_is_said_by_the_next_one_which_works(tmp_path):
    lines: list[str] = []
    with Checkpoints(tmp_path, KEEP_ALL, lines.append) as checkpoints:
        with files_of_at_most(50_000):
            checkpoints.save(1, TREES, None)
            while not checkpoints._pending.result.done():
                time.sleep(0.01)
        assert not lines
        assert checkpoints.save(2, TREES, None)
        assert len(lines) == 1 and lines[0].startswith("warning: step 1 was not saved")
        checkpoints.wait()
        assert checkpoints.steps == [2]


def test_three_failures_in_a_row_end_the_run_with_the_reason(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        with files_of_at_most(50_000):
            for step in range(FAILURES_IN_A_ROW - 1):
                checkpoints.save(step, TREES, None)
                checkpoints.wait()
        checkpoints.save(7, TREES, None)  # this one works: counted from the start again
        checkpoints.wait()
        words = "3 saves in a row failed, of step 10 because: File too large"
        with files_of_at_most(50_000), pytest.raises(HippocampusError, match=words) as caught:
            for step in range(8, 8 + FAILURES_IN_A_ROW):
                checkpoints.save(step, TREES, None)
                checkpoints.wait()
    assert caught.value.exit_code == 1
    assert names(tmp_path) == ["7"]


def test_a_save_that_dies_as_an_error_ends_the_run_hides_nothing(tmp_path):
    lines: list[str] = []
    with pytest.raises(KeyError, match="the real one"), files_of_at_most(50_000), \
            Checkpoints(tmp_path, KEEP_ALL, lines.append) as checkpoints:
        checkpoints.save(1, TREES, None)
        raise KeyError("the real one")
    assert len(lines) == 1 and not names(tmp_path)


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free._replace(free=220_000))
    lines: list[str] = []
    with Checkpoints(tmp_path, KEEP_ALL, lines.append) as checkpoints:
        assert checkpoints.save(1, TREES, None) is False  # 200 kB and a margin
        assert not names(tmp_path) and checkpoints.steps == []
        assert lines == [f"warning: step 1 was not saved: 0.2 MiB are free on {tmp_path}, "
                         "0.2 are needed"]
        monkeypatch.undo()
        assert checkpoints.save(2, TREES, None) is True


def test_space_is_told_in_units_that_fit(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free._replace(free=3 * 2**28))
    assert step_folders.lack_of_space(tmp_path, 2**30) == (
        f"0.8 GiB are free on {tmp_path}, 1.3 are needed")
    assert step_folders.lack_of_space(tmp_path, 2**29) is None


@pytest.mark.parametrize("asks_first", [True, False])
def test_a_disk_that_fills_up_keeps_what_was_saved_before(small_disk, monkeypatch, asks_first):
    if not asks_first:  # somebody else may fill it after the question
        monkeypatch.setattr(step_folders, "lack_of_space", lambda folder, size: None)
    folder, lines = small_disk / "steps", []
    with Checkpoints(folder, KEEP_ALL, lines.append) as checkpoints:
        with pytest.raises(HippocampusError, match="3 saves in a row"):
            for step in range(1, 40):
                checkpoints.save(step, TREES, None)
                checkpoints.wait()
        steps = checkpoints.steps
    assert len(steps) >= 4 and names(folder) == sorted(map(str, steps))
    words = "MiB are free" if asks_first else "No space left on device"
    assert len(lines) == FAILURES_IN_A_ROW - 1 and all(words in line for line in lines)
    assert_whole(folder, steps[-1])
    shutil.rmtree(folder / str(steps[0]))  # somebody makes room
    shutil.rmtree(folder / str(steps[1]))
    with Checkpoints(folder, KEEP_ALL, lines.append) as checkpoints:
        assert checkpoints.save(50, TREES, None)
    assert_whole(folder, 50)


# ---------------------------------------------------------------- not there, odd names

def test_a_folder_that_vanishes_is_one_line_a_save(tmp_path):
    lines: list[str] = []
    folder = tmp_path / "steps"
    with Checkpoints(folder, KEEP_ALL, lines.append) as checkpoints:
        checkpoints.save(1, TREES, None)
        checkpoints.wait()
        shutil.rmtree(folder)
        assert checkpoints.save(2, TREES, None) is False
    assert lines == [f"warning: step 2 was not saved: {folder}: No such file or directory"]


@pytest.mark.parametrize("made_anew", [True, False])
def test_a_run_that_is_moved_in_the_middle_of_a_save_loses_that_save_and_leaves_no_step_behind(
        tmp_path, monkeypatch, made_anew):
    run, moved, lines = tmp_path / "run", tmp_path / "moved", []
    run.mkdir()
    (run / "config.json").write_text("{}")
    write = OrbaxStep.write

    def write_and_move(self, folder, *rest):
        response = write(self, folder, *rest)

        def result():
            response.result()
            run.rename(moved)
            if not made_anew:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
            shutil.copytree(moved / "steps" / "2", folder)  # as whole as Orbax can see

        return SimpleNamespace(result=result)

    with Checkpoints(run / "steps", KEEP_ALL, lines.append,
                     run_file=run / "config.json") as checkpoints:
        checkpoints.save(1, TREES, 1.0)
        checkpoints.wait()
        monkeypatch.setattr(OrbaxStep, "write", write_and_move)
        checkpoints.save(2, TREES, 0.5)
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best) == ([1], 1)
    why = (f"{run / 'config.json'}: gone meanwhile" if made_anew
           else f"{run / 'steps' / '2'}: No such file or directory")
    assert lines == [f"warning: step 2 was not saved: {why}"]
    assert not (run / "steps").exists()
    assert_whole(moved / "steps", 1)


def test_a_file_in_the_place_of_the_folder_is_a_checkpoint_error(tmp_path):
    (tmp_path / "steps").write_text("")
    with pytest.raises(CheckpointError, match="steps cannot be written: "):
        Checkpoints(tmp_path / "steps", KEEP_ALL)
    with Checkpoints(tmp_path / "steps") as checkpoints:
        assert checkpoints.steps == []


@pytest.mark.parametrize("name", ["a run", "мозг 海馬", "50%.d", "it's"])
def test_a_relative_folder_with_an_odd_name_works(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = type(tmp_path)(name)
    with Checkpoints(path, KEEP_ALL) as checkpoints:
        checkpoints.save(1, TREES, 1.0)
    assert_whole(path, 1)
    with Checkpoints(path, KEEP_ALL) as checkpoints:
        assert checkpoints.restore_newest(LIKE)[0] == 1


# ---------------------------------------------------------------- killed

def test_a_deletion_killed_half_way_is_neither_newest_nor_best_nor_damaged(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        for step, loss in {1: 2.0, 2: 3.0, 3: 1.0}.items():
            checkpoints.save(step, TREES, loss)
    leaving = (tmp_path / "3").rename(tmp_path / "3.deleting")
    files = [path for path in sorted(leaving.rglob("*")) if path.is_file()]
    for gone in files[:len(files) // 2]:
        gone.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps, checkpoints.best_good()) == ([1, 2], 1)
        assert leaving.exists()  # readers remove nothing
    lines: list[str] = []
    with Checkpoints(tmp_path, KEEP_ALL, lines.append) as checkpoints:
        assert checkpoints.restore_newest(LIKE)[0] == 2
    assert names(tmp_path) == ["1", "2"] and not lines


def test_a_deletion_leaves_the_name_of_the_step_first(tmp_path, monkeypatch):
    seen = []

    def stop(path, *args, **options):
        seen.append(path.name)
        raise PermissionError(13, "not today")

    lines: list[str] = []
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=0),
                     lines.append) as checkpoints:
        checkpoints.save(1, TREES, None)
        checkpoints.wait()
        monkeypatch.setattr(shutil, "rmtree", stop)
        checkpoints.save(2, TREES, None)
        checkpoints.wait()
        assert checkpoints.steps == [2]
    assert "1.deleting" in seen and names(tmp_path) == ["1.deleting", "2"]
    assert lines == ["warning: step 1 could not be deleted: not today"]


def test_older_steps_go_only_when_the_new_one_can_be_checked(tmp_path, monkeypatch):
    delete, there = step_folders.delete, []

    def watched(path):
        newer = path.with_name("2")
        there.append(has_manifest(newer) and step_folders.is_committed(newer))
        delete(path)

    monkeypatch.setattr(step_folders, "delete", watched)
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=0)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, TREES, None)
    assert there == [True] and names(tmp_path) == ["2"]


def test_what_a_killed_save_left_is_removed_and_a_person_s_files_are_not(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, TREES, None)
    for name in (COMMITTED, MANIFEST):
        (tmp_path / "3" / name).unlink()
    (tmp_path / "4.orbax-checkpoint-tmp-9" / "params").mkdir(parents=True)
    for name in ("notes", "2.damaged", "1.diverged", "backup.5"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    (tmp_path / "7").write_text("a file")
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.steps == [1, 2]
        assert names(tmp_path) == ["1", "1.diverged", "2", "2.damaged", "7", "backup.5", "notes"]
        assert checkpoints.save(3, TREES, None)
    assert_whole(tmp_path, 3)


SAVER = """
import itertools, sys
from pathlib import Path
import jax, jax.numpy as jnp
from hippocampus.config import CheckpointConfig
from hippocampus.runs.checkpoints import Checkpoints
config = CheckpointConfig(keep_latest=2, keep_best=1)
with Checkpoints(Path(sys.argv[1]), config, print) as checkpoints:
    first = (checkpoints.latest or 0) + 1
    x = jnp.arange(1 << 18, dtype=jnp.float32)
    for step in itertools.count(first):
        checkpoints.save(step, {"params": {"x": x + step}}, abs(step % 17 - 8.0))
        print("save", step, flush=True)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.full)])
def test_a_kill_at_any_moment_of_saving_and_deleting_leaves_only_good_steps(tmp_path, kills):
    draw, folder = random.Random(kills), tmp_path / "steps"
    newest, like = 0, {"params": {"x": jax.ShapeDtypeStruct((1 << 18,), jnp.float32, sharding=(
        jax.sharding.SingleDeviceSharding(jax.devices()[0])))}}
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], text=True,
                                   stdout=subprocess.PIPE, env=tiny_run.environment())
        started = 0
        for line in process.stdout:
            assert line.startswith("save "), line
            started = int(line.split()[1])
            if started > newest + 3:
                time.sleep(draw.random() * 0.06)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        lines: list[str] = []
        with Checkpoints(folder, CheckpointConfig(keep_latest=2), lines.append) as checkpoints:
            step, back = checkpoints.restore_newest(like)
            # The save before the one that was announced is on disk; at most its digests are not.
            assert step >= started - 1 and not [line for line in lines if "damaged" in line]
            np.testing.assert_array_equal(
                back["params"]["x"], np.arange(1 << 18, dtype=np.float32) + step)
            for other in checkpoints.steps:
                assert checkpoints.best_good(other) == other
            assert len(checkpoints.steps) <= 5 and names(folder) == sorted(
                map(str, checkpoints.steps))
        newest = step
