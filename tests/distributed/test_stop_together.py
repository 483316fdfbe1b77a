"""Two real processes that are told to stop: one of them or both, at any time, once and twice."""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import tiny_run
from processes import Process, codes, started, train, wait

from hippocampus.runs.run_folder import read_metrics

TERM, INT = signal.SIGTERM, signal.SIGINT
RUN = {"train__steps": 6, "log__every_steps": 1, "eval__every_steps": 2, "mesh__fsdp": 2,
       "eval__max_windows": 16, "checkpoint__every_steps": 3, "checkpoint__keep_latest": 100,
       "log__histogram_every_steps": 2, "sample__every_steps": 2, "sample__max_new_tokens": 2}

# The nth call of a function says so; then it takes a while, or the main thread stays in C.
PHASE = """import ctypes, importlib, sys, time
from hippocampus.train import main
from hippocampus.verbs import run_verb
where, name, nth, seconds = {phase!r}
module, _, owner = where.partition(":")
module = importlib.import_module(module)
owner = getattr(module, owner) if owner else module
real, calls = getattr(owner, name), []
def in_c(*args):
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("now", flush=True)
    lock(mutex)
def slowly(*args, **kwargs):
    calls.append(1)
    if len(calls) == nth:
        print("now", flush=True)
        time.sleep(seconds)
    return real(*args, **kwargs)
def slow_compile(*args):
    real(*args)
    return in_c
setattr(owner, name, slow_compile if name == "jit_train_step" else slowly)
run_verb(main)
"""
COMPILING = ("hippocampus.training.loop", "jit_train_step", 1, 0)


@contextlib.contextmanager
def both_at(workdir: Path, phase: tuple, where: tuple[int, ...] = (0, 1)) -> Iterator[
        list[Process]]:
    """Two processes of a run; those of `where` have come to a phase."""
    commands = [[command[0], "-c", PHASE.format(phase=phase), *command[3:]] for command in
                processes.commands(workdir, 2, processes.free_port(), RUN)]
    with started(commands, 1) as both:
        for i in where:
            until(lambda i=i: "now" in both[i].stdout, both)
        yield both


def until(holds, both: list[Process], seconds: float = 90) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up and all(p.popen.poll() is None for p in both), [
            p.stderr[-5:] for p in both]
        time.sleep(0.02)


def test_signal_to_one_process_while_both_compile_ends_both_at_once(tmp_path):
    with both_at(tmp_path / "run", COMPILING) as both:
        both[1].popen.send_signal(TERM)
        begin = time.monotonic()
        wait(both, 8)
        assert time.monotonic() - begin < 5
    assert codes(both) == [75, 75]
    assert both[0].errors + both[1].errors == [
        "stopped: SIGTERM: nothing was left to save",
        "hint: start the same command again to go on"]


@pytest.mark.full
@pytest.mark.parametrize("receivers", [(0,), (0, 1), (1, 0)])
def test_signals_to_any_process_while_both_compile_end_both_with_one_line(tmp_path, receivers):
    with both_at(tmp_path / "run", COMPILING) as both:
        for i in receivers:
            both[i].popen.send_signal(INT)
        wait(both, 8)
    assert codes(both) == [75, 75]
    assert len(both[0].errors + both[1].errors) == 2


@pytest.mark.full
@pytest.mark.parametrize("halted", [0, 1])
def test_second_signal_ends_a_process_that_waits_for_the_answer_of_a_halted_one(tmp_path, halted):
    with both_at(tmp_path / "run", COMPILING) as both:
        waiting = both[1 - halted]
        both[halted].popen.send_signal(signal.SIGSTOP)
        waiting.popen.send_signal(TERM)
        time.sleep(1)
        assert waiting.popen.poll() is None
        waiting.popen.send_signal(TERM)
        wait([waiting], 2)
    assert codes([waiting]) == [128 + TERM]


@pytest.mark.full
@pytest.mark.parametrize("present", [0, 1])
def test_process_that_waits_for_the_others_to_join_ends_at_once(tmp_path, present):
    command = processes.commands(tmp_path / "run", 2, processes.free_port(), RUN)[present]
    with started([command], 1) as (alone,):
        time.sleep(6)
        assert alone.popen.poll() is None
        alone.popen.send_signal(TERM)
        wait([alone], 3)
    assert codes([alone]) == [75]
    assert alone.errors[0] == "stopped: SIGTERM: nothing was left to save"


# ---------------------------------------------------------------- and goes on as if never stopped

@pytest.fixture(scope="module")
def uninterrupted() -> Path:
    workdir = tiny_run.folder() / "two_never_stopped"
    found = train(workdir, 2, 1, RUN)
    assert codes(found) == [0, 0], found[0].stderr[-5:]
    return workdir


def numbers(workdir: Path) -> list[tuple]:
    """Every number of metrics.jsonl that does not depend on the clock, exactly."""
    return [(row["step"], sorted((name, float(value).hex()) for name, value in row.items()
                                 if not name.startswith(("train/tokens_per", "time/"))))
            for row in read_metrics(workdir / "metrics.jsonl")]


def assert_goes_on_like(workdir: Path, other: Path) -> None:
    found = train(workdir, 2, 1, RUN)
    assert codes(found) == [0, 0], found[0].stderr[-5:]
    assert numbers(workdir) == numbers(other)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text())
    assert not (workdir / "stopped.json").exists()


TRAINING = "hippocampus.training."
PHASES = {
    "reading data": (TRAINING + "loop", "read_data", 1, 1.0),
    "training": (TRAINING + "run:Run", "place", 2, 1.0),
    "an evaluation": (TRAINING + "run:Run", "place", 5, 1.0),
    "a sample": (TRAINING + "run", "_sample", 2, 1.0),
    "a save": ("hippocampus.runs.checkpoints:Checkpoints", "save", 2, 1.0),
    "the last save": (TRAINING + "loop", "_check_saved", 1, 1.0),
    "the evaluation at the end": (TRAINING + "report", "evaluate", 2, 1.0),
}


@pytest.mark.full
@pytest.mark.parametrize("receivers", [(0,), (1,), (1, 0)])
@pytest.mark.parametrize("phase", PHASES)
def test_run_stopped_at_any_time_ends_like_one_never_stopped(tmp_path, uninterrupted, phase,
                                                             receivers):
    with both_at(tmp_path / "run", PHASES[phase]) as both:
        for i in receivers:
            both[i].popen.send_signal(TERM)
        wait(both, 30)
    assert codes(both) == [75, 75], both[0].stderr[-5:] + both[1].stderr[-5:]
    first, _ = both[0].errors + both[1].errors
    assert first.startswith("stopped: SIGTERM")
    assert_goes_on_like(tmp_path / "run", uninterrupted)


@pytest.mark.full
def test_first_signal_that_comes_late_does_not_kill_a_process_that_leaves_with_the_others(
        tmp_path, uninterrupted):
    with both_at(tmp_path / "run", ("hippocampus.distributed", "finish", 1, 2.0), ()) as both:
        until(lambda: read_metrics(tmp_path / "run" / "metrics.jsonl"), both)
        both[0].popen.send_signal(TERM)
        until(lambda: "now" in both[1].stdout, both)
        both[1].popen.send_signal(TERM)
        wait(both, 30)
    assert codes(both) == [75, 75], both[0].stderr[-5:] + both[1].stderr[-5:]
    assert_goes_on_like(tmp_path / "run", uninterrupted)


# ---------------------------------------------------------------- somebody else's processes

NOTEBOOK = """import signal, sys, time
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import hippocampus as hp
from hippocampus.training import loop
before = signal.getsignal(signal.SIGTERM)
config = hp.load_config({config!r}, {overrides!r})
place = loop.Run.place
def slowly(self, *batch):
    print("now", flush=True)
    time.sleep(0.3)
    return place(self, *batch)
loop.Run.place = slowly
try:
    hp.fit(config, sys.argv[3])
except hp.errors.Stopped as error:
    print("raised", error.message, flush=True)
loop.Run.place = place
assert signal.getsignal(signal.SIGTERM) is before
hp.fit(config, sys.argv[3])
print("done", flush=True)
"""


@pytest.mark.full
def test_fit_in_somebody_elses_processes_raises_in_all_of_them_and_can_go_on(tmp_path):
    python, _, _, config, _, *flags = tiny_run.command(tmp_path / "run", **RUN)
    overrides = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)
    script = NOTEBOOK.format(config=config.removeprefix("--config="), overrides=overrides)
    port = processes.free_port()
    commands = [[python, "-c", script, f"127.0.0.1:{port}", str(i), str(tmp_path / "run")]
                for i in (0, 1)]
    with started(commands, 1, JAX_ENABLE_PREEMPTION_SERVICE="0") as both:
        until(lambda: "now" in both[1].stdout, both)
        both[1].popen.send_signal(TERM)
        wait(both, 90)
    assert codes(both) == [0, 0], both[0].stderr[-5:] + both[1].stderr[-5:]
    raised = [[line for line in p.stdout if line.startswith("raised")] for p in both]
    assert raised[0] == raised[1] and raised[0][0].startswith("raised SIGTERM at step ")
    assert all(p.stdout[-1] == "done" or "done" in p.stdout for p in both)
