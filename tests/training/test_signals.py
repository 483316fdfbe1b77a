"""SIGTERM and SIGINT: at any time, once and twice, in a process of the run and in another's."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from hippocampus.errors import Stopped
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training import loop
from hippocampus.training.loop import fit
from hippocampus.training.signals import StopSignal

TERM, INT = signal.SIGTERM, signal.SIGINT
SHORT = {"train__steps": 4, "log__every_steps": 1, "eval__every_steps": 2,
         "eval__max_windows": 16, "checkpoint__every_steps": 3, "checkpoint__keep_latest": 100,
         "sample__max_new_tokens": 2}
RUN = {**SHORT, "train__steps": 6, "log__histogram_every_steps": 2, "sample__every_steps": 2}

# What the main thread does in C++ while XLA compiles: it keeps no lock, and handles no signal.
IN_C = """import ctypes, os, sys, time
def in_c():
    mutex = ctypes.create_string_buffer(64)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    print("now", flush=True)
    lock(mutex)
"""

# The nth call of a function says so and then takes half a second, or for ever.
TRAIN = IN_C + """
import importlib
from hippocampus.train import main
from hippocampus.verbs import run_verb
where, name, nth, seconds = sys.argv.pop(1).split(",")
module, _, owner = where.partition(":")
module = importlib.import_module(module)
owner = getattr(module, owner) if owner else module
real, calls = getattr(owner, name), []
def slowly(*args, **kwargs):
    calls.append(1)
    if len(calls) != int(nth):
        return real(*args, **kwargs)
    if not float(seconds):
        in_c()
    print("now", flush=True)
    time.sleep(float(seconds))
    return real(*args, **kwargs)
def slow_compile(*args):
    real(*args)
    return lambda state, batch: in_c()
setattr(owner, name, slow_compile if name == "jit_train_step" else slowly)
run_verb(main)
"""


def started(script: str, *arguments: str, **how) -> subprocess.Popen:
    """A script that has come to the line "now"."""
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], text=True,
                               env=tiny_run.environment(),
                               **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how})
    for line in process.stdout:
        if line == "now\n":
            return process
    raise AssertionError(process.communicate()[1])


def send(process: subprocess.Popen, *numbers: int, within: float = 60) -> tuple[int, list[str]]:
    """Sends signals, a moment apart; returns the exit code and the last lines of stderr."""
    try:
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        _, stderr = process.communicate(timeout=within)
    finally:
        process.kill()
        process.wait()
    return process.returncode, (stderr or "").splitlines()[-2:]


def stopped(workdir: Path, number: int, where: str, name: str, nth: int = 1, seconds: float = 0.8,
            within: float = 60, run: Mapping[str, Any] = RUN) -> tuple[int, list[str]]:
    """Starts a run and sends a signal while a function is called for the nth time."""
    _, _, _, *flags = tiny_run.command(workdir, **run)
    return send(started(TRAIN, f"{where},{name},{nth},{seconds}", *flags), number, within=within)


# ---------------------------------------------------------------- the process belongs to the run

@pytest.mark.parametrize("number", [TERM, INT])
def test_signal_with_nothing_unsaved_ends_the_process_even_while_it_is_in_c(number):
    process = started(IN_C + """
from hippocampus.training.signals import StopSignal
with StopSignal(owns_process=True):
    in_c()
""")
    begin = time.monotonic()
    assert send(process, number) == (75, [
        f"stopped: {signal.Signals(number).name}: nothing was left to save",
        "hint: start the same command again to go on"])
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("number", [TERM, INT])
def test_second_signal_ends_the_process_at_once(number):
    process = started(IN_C + """
from hippocampus.training.signals import StopSignal
with StopSignal(owns_process=True) as stop:
    stop.unsaved()
    in_c()
""")
    process.send_signal(TERM)
    time.sleep(1)
    assert process.poll() is None, "something was unsaved"
    assert send(process, number, within=2) == (128 + number, [])


def test_second_signal_is_heard_while_nobody_reads_what_the_first_one_prints():
    read, write = os.pipe()
    os.set_blocking(write, False)
    while True:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    try:
        process = started(IN_C + """
from hippocampus.training.signals import StopSignal
with StopSignal(owns_process=True):
    in_c()
""", stderr=write)
        process.send_signal(TERM)
        time.sleep(0.5)
        assert process.poll() is None, "it was to wait for its message to be taken"
        assert send(process, INT, within=2)[0] == 130
    finally:
        os.close(read)
        os.close(write)


def test_signal_that_comes_while_handlers_are_installed_or_removed_is_not_lost():
    # Every 50th time one is sent; each is either noted, or ends the process as before.
    process = started("""import os, signal, threading, time
from hippocampus.training.signals import StopSignal
print("now", flush=True)
n = 0
while True:
    n += 1
    with StopSignal(owns_process=True) as stop:
        stop.unsaved()
        if n % 50 == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            while stop.here() is None:
                time.sleep(0.001)
    if n == 400:
        print(len(os.listdir("/proc/self/fd")), threading.active_count(),
              signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1), flush=True)
        break
time.sleep(0.3)
while True:
    with StopSignal(owns_process=True) as stop:
        stop.unsaved()
        if stop.here():
            break
""")
    assert process.stdout.readline() == "4 1 0 -1\n"  # the fourth lists the others
    time.sleep(1)
    code, _ = send(process, TERM, within=3)
    assert code in (0, -TERM, 75)


def test_signal_while_compiling_ends_a_run_at_once_and_leaves_nothing_half_done(tmp_path):
    begin = time.monotonic()
    code, lines = stopped(tmp_path / "run", TERM, "hippocampus.training.loop", "jit_train_step",
                          within=3, run=SHORT)
    assert code == 75, lines
    assert lines == ["stopped: SIGTERM: nothing was left to save",
                     "hint: start the same command again to go on"]
    assert not list((tmp_path / "run" / "steps").iterdir())
    assert not read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert time.monotonic() - begin < 40


# ---------------------------------------------------------------- and goes on as if never stopped

@functools.cache
def uninterrupted(*items: tuple[str, Any]) -> Path:
    workdir = tiny_run.folder() / f"never_stopped_{len(items)}"
    done = tiny_run.run(tiny_run.command(workdir, **dict(items)))
    assert done.returncode == 0, done.stderr
    return workdir


def numbers(workdir: Path) -> list[tuple]:
    """Every number of metrics.jsonl that does not depend on the clock, exactly."""
    return [(row["step"], sorted((name, float(value).hex()) for name, value in row.items()
                                 if not name.startswith(("train/tokens_per", "time/"))))
            for row in read_metrics(workdir / "metrics.jsonl")]


def assert_ends_like_one_never_stopped(workdir: Path, run: Mapping[str, Any] = RUN) -> None:
    from hippocampus.runs.checkpoints import Checkpoints

    other = uninterrupted(*run.items())
    done = tiny_run.run(tiny_run.command(workdir, **run))
    assert done.returncode == 0, done.stderr
    assert numbers(workdir) == numbers(other)
    assert json.loads((workdir / "results.json").read_text()) == json.loads(
        (other / "results.json").read_text())
    with Checkpoints(workdir / "steps") as own, Checkpoints(other / "steps") as wanted:
        assert own.best == wanted.best
        assert {step: own.losses()[step] for step in wanted.steps} == wanted.losses()
    for path in (other / "samples").iterdir():
        assert (workdir / "samples" / path.name).read_text() == path.read_text()
    assert not (workdir / "stopped.json").exists()


@pytest.mark.full
def test_run_stopped_in_an_evaluation_does_it_later_and_ends_like_one_never_stopped(tmp_path):
    # The second of two batches of averaged weights, after step 2.
    code, lines = stopped(tmp_path / "run", INT, "hippocampus.training.run:Run", "place", nth=5,
                          run=SHORT)
    assert (code, lines[0]) == (75, "stopped: SIGINT at step 2: everything is saved")
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"step": 2}
    assert_ends_like_one_never_stopped(tmp_path / "run", SHORT)


TRAINING = "hippocampus.training."
PHASES = {
    "reading data": (TRAINING + "loop", "read_data", 1, "nothing was left to save"),
    "opening the folder": (TRAINING + "loop", "_open_folder", 1, "nothing was left to save"),
    "building": (TRAINING + "loop", "sharded_init", 1, "nothing was left to save"),
    "training": (TRAINING + "run:Run", "place", 2, "at step 2"),
    "a row": (TRAINING + "run:Run", "write_pending", 3, "at step "),
    "histograms": (TRAINING + "run", "_draw", 2, "at step 4"),
    "a sample": (TRAINING + "run", "_sample", 2, "at step 4"),
    "a save": ("hippocampus.runs.checkpoints:Checkpoints", "save", 2, "at step "),
    "a manifest": ("hippocampus.runs.checkpoints", "write_manifest", 1, "at step "),
    "the last evaluation": (TRAINING + "run", "_evaluate", 3, "at step 6"),
    "the last save": (TRAINING + "loop", "_check_saved", 1, "nothing was left to save"),
    "the evaluation at the end": (TRAINING + "report", "evaluate", 2, "nothing was left to save"),
    "the sample at the end": (TRAINING + "report", "generate_sample", 3,
                              "nothing was left to save"),
}


@pytest.mark.full
@pytest.mark.parametrize("number", [TERM, INT])
@pytest.mark.parametrize("phase", PHASES)
def test_run_stopped_at_any_time_ends_like_one_never_stopped(tmp_path, phase, number):
    where, name, nth, words = PHASES[phase]
    code, lines = stopped(tmp_path / "run", number, where, name, nth)
    assert code == 75, lines
    assert lines[0].startswith(f"stopped: {signal.Signals(number).name}")
    assert words in lines[0]
    assert_ends_like_one_never_stopped(tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize("phase", ["a save", "a manifest", "the last evaluation"])
def test_run_that_a_second_signal_ended_loses_no_number(tmp_path, phase):
    where, name, nth, _ = PHASES[phase]
    _, _, _, *flags = tiny_run.command(tmp_path / "run", **RUN)
    process = started(TRAIN, f"{where},{name},{nth},60", *flags)
    assert send(process, TERM, TERM, within=2)[0] == 128 + TERM
    assert_ends_like_one_never_stopped(tmp_path / "run")


# ---------------------------------------------------------------- somebody else's process

def handlers() -> list:
    return [signal.getsignal(TERM), signal.getsignal(INT), signal.set_wakeup_fd(-1)]


def test_fit_raises_stopped_in_somebody_elses_process_and_gives_signals_back(tmp_path, monkeypatch):
    before, threads = handlers(), threading.active_count()
    place = loop.Run.place

    def signalled(self, *batch):
        signal.raise_signal(TERM)
        return place(self, *batch)

    monkeypatch.setattr(loop.Run, "place", signalled)
    with pytest.raises(Stopped, match="SIGTERM: nothing was left to save") as caught:
        fit(tiny_run.config(train__steps=3), tmp_path / "run")
    assert caught.value.exit_code == 75 and handlers() == before

    calls = []

    def signalled_later(self, *batch):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(INT)
        return place(self, *batch)

    monkeypatch.setattr(loop.Run, "place", signalled_later)
    with pytest.raises(Stopped, match="SIGINT at step 2: everything is saved"):
        fit(tiny_run.config(train__steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "steps" / "2").is_dir() and handlers() == before
    assert threading.active_count() <= threads + 3  # Orbax keeps some


def test_second_signal_interrupts_somebody_elses_process():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        stop.unsaved()
        signal.raise_signal(TERM)
        assert stop.here() is TERM and stop.wanted is TERM
        signal.raise_signal(TERM)
    assert handlers() == before


def test_what_is_saved_last_raises_for_a_signal_that_came_before():
    with pytest.raises(Stopped, match="SIGINT: nothing was left to save"), StopSignal() as stop:
        stop.unsaved()
        signal.raise_signal(INT)
        stop.all_saved()


def test_signal_between_two_handlers_that_are_given_back_goes_to_the_one_before(monkeypatch):
    got, real, sent = [], signal.signal, []

    def noisy(number, handler):
        found = real(number, handler)
        if handler is note and not sent:  # SIGTERM is given back, SIGINT is not
            sent.append(1)
            signal.raise_signal(INT)
        return found

    def note(number, frame):
        got.append(number)

    old = [real(number, note) for number in (TERM, INT)]
    try:
        with StopSignal():
            monkeypatch.setattr(signal, "signal", noisy)
        assert got == [INT] and handlers()[:2] == [note, note]
    finally:
        for number, handler in zip((TERM, INT), old, strict=True):
            real(number, handler)


def test_signal_while_handlers_are_installed_gives_all_of_them_back(monkeypatch):
    before, real = handlers(), signal.signal

    def noisy(number, handler):
        found = real(number, handler)
        if number == TERM and handler not in before:
            signal.raise_signal(TERM)
        return found

    monkeypatch.setattr(signal, "signal", noisy)
    with pytest.raises(Stopped), StopSignal():
        pass
    assert handlers() == before


def test_another_thread_than_the_main_one_trains_without_handlers():
    before, found = handlers(), []

    def use():
        with StopSignal() as stop:
            found.append((handlers_of_signals(), stop.here()))

    def handlers_of_signals():
        return [signal.getsignal(TERM), signal.getsignal(INT)]

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(before[:2], None)]
