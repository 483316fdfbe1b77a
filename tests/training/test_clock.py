"""Where a run's time goes, and how fast it is without what is not training."""

import pytest
import tiny_run

from hippocampus.training import clock as clock_module
from hippocampus.training.clock import KINDS, Clock, clock_face, summary


class Time:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(clock_module.time, "perf_counter", time)
    return time


def series(values: dict) -> dict:
    return {name: value for name, value in values.items() if name.startswith("train/tokens")}


def test_tokens_per_second_leave_out_compiling_and_pauses(time):
    clock = Clock(tiny_run.config(train__steps=100), n_devices=1)
    time.now += 60  # compiling
    assert series(clock.lap(1)) == {} and clock.seconds_left(1) is None
    time.now += 2
    with clock.during("evaluation"):
        time.now += 30
    time.now += 3
    assert clock.lap(11)["train/tokens_per_second"] == pytest.approx(10 * 8 * 16 / 5)
    assert clock.seconds_left(11) == pytest.approx(89 / 2)
    time.now += 1
    assert clock.lap(13)["train/tokens_per_second"] == pytest.approx(2 * 8 * 16 / 1)


def test_waiting_for_data_makes_a_run_slower(time):
    clock = Clock(tiny_run.config(train__steps=100), n_devices=1)
    clock.lap(1)
    with clock.during("data"):
        time.now += 4
    time.now += 4
    assert clock.lap(2)["train/tokens_per_second"] == pytest.approx(8 * 16 / 8)


def spend(clock, time, **seconds):
    for kind, n in seconds.items():
        if kind == "training":
            time.now += n
        else:
            with clock.during(kind):
                time.now += n


def test_every_second_is_put_down_once(time):
    clock = Clock(tiny_run.config(), 1, started=90.0)
    clock.begins()  # ten seconds after the start
    spend(clock, time, compile=20, training=50, data=1, checkpoint=2, evaluation=3, samples=4,
          profile=6)
    assert clock.account() == pytest.approx({
        "start": 10, "compile": 20, "training": 50, "data": 1, "checkpoint": 2, "evaluation": 3,
        "samples": 4, "profile": 6, "lost": 0})
    row = clock.lap(5)
    assert {name for name in row if name.startswith("time/")} == {f"time/{k}" for k in KINDS}


def test_training_behind_the_checkpoint_of_a_killed_run_is_lost(time):
    first = Clock(tiny_run.config(), 1)
    rows = []
    for step in (10, 20, 30):
        spend(first, time, training=5, checkpoint=1)
        rows.append({"step": step, **first.lap(step)})
    rows.append({"step": 30, "eval/loss": 1.0})
    second = Clock(tiny_run.config(), 1)
    second.carry_on(rows, 20)
    spend(second, time, training=5)
    assert second.account() == pytest.approx({
        **dict.fromkeys(KINDS, 0), "training": 15, "lost": 5, "checkpoint": 3})
    third = Clock(tiny_run.config(), 1)
    third.carry_on(rows, 5)  # before every row
    assert third.account()["training"] == pytest.approx(0)
    assert third.account()["lost"] == pytest.approx(15)


def test_rows_of_an_older_version_have_no_account(time):
    clock = Clock(tiny_run.config(), 1)
    clock.carry_on([{"step": 1, "train/loss": 2.0}], 1)
    assert clock.account() == dict.fromkeys(KINDS, 0)


def test_summary_names_training_first_and_then_what_took_longest():
    account = {**dict.fromkeys(KINDS, 0.0), "training": 90.0, "compile": 2.0, "checkpoint": 8.0}
    assert summary(account) == "time: 1m40s, 90.0% training, 8.0% checkpoint, 2.0% compile"
    assert clock_face(3600 + 120) == "1h02m"
