"""Two and four real processes train one model: the same bits, one stop, one line of error."""

import json
import signal
import time

import processes
import pytest
import tiny_run
from processes import codes, started, train, wait
from tiny_run import series

from hippocampus.runs.run_folder import read_metrics

# Runs at a tenth of a second per step, and says how many rows of a batch each process has read.
SLOW = """import sys, time
from hippocampus.training import loop
from hippocampus.train import main
from hippocampus.verbs import run_verb
place = loop.Run.place
def slowly(self, *batch):
    if len(batch) > 1:
        time.sleep(0.1)
        print("rows", len(batch[0].tokens_BT), flush=True)
    return place(self, *batch)
loop.Run.place = slowly
run_verb(main)
"""
# One process fails in the middle of a run, while the others wait for it in a collective.
FAILS = """import sys, time
from hippocampus.errors import DataError
from hippocampus.training import loop
from hippocampus.train import main
from hippocampus.verbs import run_verb
place, calls = loop.Run.place, []
def fails(self, *batch):
    calls.append(1)
    if len(calls) == 3 and "--process_id=1" in sys.argv:
        raise {error}
    return place(self, *batch)
loop.Run.place = fails
run_verb(main)
"""
RUN = {"train__steps": 16, "log__every_steps": 1, "eval__every_steps": 8, "mesh__fsdp": 2,
       "checkpoint__every_steps": 100, "log__histogram_every_steps": 8, "sample__every_steps": 8,
       "sample__max_new_tokens": 2}


def scripted(script: str, commands: list[list[str]]) -> list[list[str]]:
    """The commands with a script in place of the verb."""
    return [[command[0], "-c", script, *command[3:]] for command in commands]


def test_two_processes_stopped_through_one_of_them_end_with_the_bits_of_one_process(tmp_path):
    (alone,) = train(tmp_path / "one", 1, 2, RUN)
    assert alone.popen.returncode == 0, alone.stderr[-5:]

    commands = processes.commands(tmp_path / "two", 2, processes.free_port(), RUN)
    with started(scripted(SLOW, commands), 1) as both:
        give_up = time.monotonic() + 100
        while len(read_metrics(tmp_path / "two" / "metrics.jsonl")) < 3:
            assert time.monotonic() < give_up and both[0].popen.poll() is None, both[0].stderr
            time.sleep(0.05)
        both[1].popen.send_signal(signal.SIGTERM)
        wait(both)
    assert codes(both) == [75, 75]
    step = read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]["step"]
    assert 3 <= step < RUN["train__steps"]
    assert both[0].errors == [f"stopped: SIGTERM at step {step}: everything is saved",
                              "hint: start the same command again to go on"]
    assert both[1].errors == []
    # Only the first one prints, and each has read its own half of the batch.
    assert {line for line in both[1].stdout if "Gloo" not in line} == {"rows 4"}
    assert "rows 4" in both[0].stdout and "rows 8" not in both[0].stdout
    assert (tmp_path / "two" / "steps" / str(step)).is_dir()

    again = train(tmp_path / "two", 2, 1, RUN)
    assert codes(again) == [0, 0], again[0].stderr[-5:]
    assert any(line == f"going on from step {step}" for line in again[0].stdout)
    assert series(tmp_path / "two") == series(tmp_path / "one")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in
               ("one", "two")]
    assert results[0] == results[1]
    samples = [{p.name: p.read_text() for p in (tmp_path / name / "samples").iterdir()}
               for name in ("one", "two")]
    assert samples[0] == samples[1] and set(samples[0]) == {"8.txt", "best.txt"}

    measured = processes.evaluate(tmp_path / "two", 2)
    assert codes(measured) == [0, 0], measured[0].stderr[-5:]
    assert any(line.startswith("tokenizer bytes") for line in measured[0].stdout)
    assert not any(line.startswith("tokenizer bytes") for line in measured[1].stdout)
    rows = json.loads((tmp_path / "two" / results[0]["evaluation"]).read_text())["rows"]
    (averaged,) = (row for row in rows if row["weights"] == "ema")
    assert averaged["nats_per_token"] == pytest.approx(results[0]["final/loss"], rel=1e-6)


def test_processes_that_were_not_started_alike_end_with_one_line(tmp_path):
    found = train(tmp_path / "run", 2, 1, RUN, of_process={1: {"train__seed": 3}})
    assert codes(found) == [64, 64]
    lines = found[0].errors + found[1].errors
    assert lines == ["error: process 1 has train.seed = 3, process 0 has 0",
                     "hint: start every process with the same command, versions and data"]
    assert not (tmp_path / "run").exists()


def test_another_number_of_devices_than_expected_ends_with_one_line(tmp_path):
    found = train(tmp_path / "run", 2, 1, RUN, flags=["--expect_devices=8"])
    assert codes(found) == [64, 64]
    lines = found[0].errors + found[1].errors
    assert len(lines) == 2
    assert lines[0] == "error: 8 devices are expected, but JAX sees 2 (cpu, 2 processes)"
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize(("error", "code", "line"), [
    ("DataError('the disk is gone', 'mount it')", 66, "error: the disk is gone"),
    ("ZeroDivisionError('a bug')", 1, "ZeroDivisionError: a bug")])
def test_error_on_one_process_ends_the_others_with_its_code_and_one_line(tmp_path, error, code,
                                                                         line):
    commands = processes.commands(tmp_path / "run", 2, processes.free_port(), RUN)
    with started(scripted(FAILS.replace("{error}", error), commands), 1) as both:
        wait(both)
    assert codes(both) == [code, code], both[0].stderr
    assert [line in process.stderr for process in both] == [False, True]
    assert not both[0].errors


@pytest.mark.full
def test_run_in_use_is_refused_on_every_process(tmp_path):
    from hippocampus.runs.run_folder import RunFolder, RunLock

    lock = RunLock(RunFolder(tmp_path / "run"))
    try:
        found = train(tmp_path / "run", 2, 1, RUN)
    finally:
        lock.release()
    assert codes(found) == [64, 64]
    (line, _) = found[0].errors + found[1].errors
    assert "run is in use by process" in line


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_survivor_of_a_killed_process_ends_soon_and_the_run_goes_on_later(tmp_path, victim):
    changes = {**RUN, "checkpoint__every_steps": 2, "train__steps": 60}
    commands = processes.commands(tmp_path / "run", 2, processes.free_port(), changes)
    with started(scripted(SLOW, commands), 1, HIPPOCAMPUS_HEARTBEAT_SECONDS="5") as both:
        give_up = time.monotonic() + 100
        while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 5:
            assert time.monotonic() < give_up and both[0].popen.poll() is None, both[0].stderr
            time.sleep(0.05)
        both[victim].popen.kill()
        wait(both, seconds=40)
    assert both[1 - victim].popen.returncode not in (0, 64, 66, 75)
    again = train(tmp_path / "run", 2, 1, changes)
    assert codes(again) == [0, 0]
    assert any(line.startswith("going on from step ") for line in again[0].stdout)
    steps = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")
             if "train/loss" in row]
    assert steps == list(range(1, 61))


EVERYTHING = {"model__paths": ("ssm", "hopfield", "attention"), "model__hopfield__patterns": "both",
              "model__hopfield__n_slots": 4, "model__hopfield__depth_schedule": (2,),
              "model__segments__train": 2, "model__segments__weights": (0.3, 1.0),
              "train__steps": 4, "mesh__fsdp": 2, "mesh__sequence": 2, "eval__every_steps": 2,
              "log__every_steps": 1, "sample__max_new_tokens": 1}


@pytest.mark.full
def test_four_devices_give_the_same_bits_over_one_two_and_four_processes(tmp_path):
    for n in (1, 2, 4):
        found = train(tmp_path / str(n), n, 4 // n, EVERYTHING)
        assert codes(found) == [0] * n, found[0].stderr[-5:]
    (lone,) = train(tmp_path / "lone", 1, 1, {**EVERYTHING, "mesh__fsdp": 1, "mesh__sequence": 1})
    assert lone.popen.returncode == 0
    assert len(series(tmp_path / "1")) == 6
    assert series(tmp_path / "2") == series(tmp_path / "1") == series(tmp_path / "4")
    rows = zip(read_metrics(tmp_path / "lone" / "metrics.jsonl"),
               read_metrics(tmp_path / "4" / "metrics.jsonl"), strict=True)
    for one, four in rows:
        for name in ("train/loss", "eval/loss"):
            if name in one:
                assert one[name] == pytest.approx(four[name], rel=1e-5)


@pytest.mark.full
def test_sums_over_four_devices_differ_by_rounding_only(tmp_path):
    # Gloo, between processes, adds four numbers in another order than XLA inside of one.
    for n in (1, 2, 4):
        found = train(tmp_path / str(n), n, 4 // n, {**RUN, "train__steps": 4})
        assert codes(found) == [0] * n, found[0].stderr[-5:]
    assert series(tmp_path / "2") == series(tmp_path / "4")
    for row, wanted in zip(series(tmp_path / "1"), series(tmp_path / "4"), strict=True):
        assert [float.fromhex(value) for _, value in row[1]] == pytest.approx(
            [float.fromhex(value) for _, value in wanted[1]], rel=1e-5)


def test_environment_of_the_tests_has_nothing_of_a_cluster(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("HTTPS_PROXY", "http://nowhere")
    env = processes.clean_environment(2)
    assert not {"SLURM_NTASKS", "HTTPS_PROXY"} & set(env) and "PATH" in env
    assert tiny_run.environment()["SLURM_NTASKS"] == "4"
