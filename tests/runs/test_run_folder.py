"""Who may write to a run folder, and its small files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from hippocampus.config import Config
from hippocampus.config_files import to_json
from hippocampus.errors import ConfigError, DataError
from hippocampus.runs.run_folder import (
    RunFolder,
    RunLock,
    cut_metrics,
    environment,
    read_metrics,
)

HOLD = """import sys, time
from pathlib import Path
from hippocampus.runs.run_folder import RunFolder, RunLock
lock = RunLock(RunFolder(Path(sys.argv[1])))
print("held", flush=True)
time.sleep(60)
"""
TAKE = HOLD.replace("time.sleep(60)\n", "")


@pytest.fixture
def holder(tmp_path):
    """Another process that has the lock of tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], text=True,
                               stdout=subprocess.PIPE, env=tiny_run.environment())
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_is_refused_at_once_and_told_who_has_the_folder(tmp_path, holder):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        RunLock(RunFolder(tmp_path))
    assert time.monotonic() - start < 1
    assert caught.value.message.startswith(f"{tmp_path} is in use by process {holder.pid} on ")
    assert holder.poll() is None


def test_refused_process_leaves_the_name_of_the_holder(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
            RunLock(RunFolder(tmp_path))


def test_lock_vanishes_with_a_killed_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    RunLock(RunFolder(tmp_path)).release()


def test_lock_can_be_taken_again_after_release(tmp_path):
    folder = RunFolder(tmp_path / "new" / "run")
    RunLock(folder).release()
    RunLock(folder).release()
    take = subprocess.run([sys.executable, "-c", TAKE, str(folder.path)],
                          env=tiny_run.environment(), capture_output=True, text=True)
    assert take.stdout == "held\n", take.stderr


def test_lock_is_held_until_release(tmp_path):
    lock = RunLock(RunFolder(tmp_path))
    take = subprocess.run([sys.executable, "-c", TAKE, str(tmp_path)],
                          env=tiny_run.environment(), capture_output=True, text=True)
    lock.release()
    assert "ConfigError" in take.stderr and f"process {os.getpid()} on" in take.stderr


def test_lock_in_a_place_that_cannot_be_a_folder_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        RunLock(RunFolder(tmp_path / "file" / "run"))


# ---------------------------------------------------------------- may we use it

def is_usable(path) -> None:
    before = sorted(path.parent.rglob("*"))
    try:
        RunFolder(path).check_usable()
    finally:
        assert sorted(path.parent.rglob("*")) == before, "the check wrote something"


def test_new_and_empty_folders_are_usable(tmp_path):
    is_usable(tmp_path / "a" / "b")
    (tmp_path / "empty").mkdir()
    is_usable(tmp_path / "empty")


def test_folder_of_git_with_only_a_gitkeep_is_usable(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".gitkeep").write_text("")
    is_usable(tmp_path / "run")


def test_our_run_is_usable(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.config.write_text(to_json(Config()))
    (run.path / "metrics.jsonl").write_text("")
    is_usable(run.path)
    assert run.is_run()


def test_run_killed_before_its_config_was_written_is_usable(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    for name in (".lock", "tokenizer.json", "data.json", "env.json", ".config.json.123.partial"):
        (run.path / name).write_text("{}")
    is_usable(run.path)


def test_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        is_usable(tmp_path / "file")


def test_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot write to"):
        is_usable(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "model.safetensors", "steps"])
def test_folder_of_somebody_else_is_refused_naming_what_it_holds(tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"not empty and not a run folder.*{name}"):
        is_usable(tmp_path / "run")


@pytest.mark.parametrize("content", ['{"model_type": "llama"}', "not json", ""])
def test_config_json_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises((ConfigError, DataError)):
        is_usable(tmp_path / "run")


def test_folder_without_permission_is_refused(tmp_path, monkeypatch):
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=f"cannot write to {tmp_path}"):
        is_usable(tmp_path / "run")


# ---------------------------------------------------------------- small files

def test_metrics_are_read_without_a_line_that_a_crash_tore(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2}\n{"step": 3, "tra')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.5}, {"step": 2}]
    assert read_metrics(tmp_path / "none") == []


def test_metrics_beyond_a_step_and_a_torn_line_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/loss": 0.1 + step} for step in (2, 4, 4, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 8, "x')
    cut_metrics(path, 4)
    assert read_metrics(path) == rows[:3]
    assert path.read_text().endswith("}\n"), "the next row needs a line of its own"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cutting_keeps_every_bit_of_what_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = json.dumps({"step": 1, "train/loss": 0.1 + 0.2, "eval/loss": 5e-324}) + "\n"
    path.write_text(text)
    cut_metrics(path, 1)
    assert path.read_text() == text


def test_cutting_replaces_the_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    before = path.read_text()

    def crash(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("pathlib.Path.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cut_metrics(path, 1)
    assert path.read_text() == before


def test_cutting_a_file_that_is_not_there_makes_none(tmp_path):
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_environment_has_what_reproduces_a_number():
    record = json.loads(json.dumps(environment()))
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(record["packages"])
    assert record["devices"] and record["processes"] == 1
    assert {"python", "platform", "commit", "command", "xla_flags"} <= set(record)


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", Path("gs://bucket/run"),
                                   "memory://run"])
def test_run_folder_on_an_object_store_is_refused(place):
    with pytest.raises(ConfigError, match="is not on a file system") as caught:
        RunFolder.at(place)
    assert "docs/distributed.md" in caught.value.hint


@pytest.mark.parametrize("place", ["checkpoints/a:b", "C:/runs/a", "/a/b", Path("x")])
def test_run_folder_on_a_file_system_is_where_it_was_named(place):
    assert RunFolder.at(place) == RunFolder(Path(place))
