"""A step that hangs is told with the stacks of all threads, and nothing else is."""

import threading
import time

import pytest

from hippocampus.training.watchdog import Watchdog

USUAL, LEAST, STUCK = 0.002, 0.2, 0.5


@pytest.fixture
def lines():
    return []


@pytest.fixture
def watchdog(tmp_path, lines):
    with Watchdog(tmp_path, factor=10.0, least_seconds=LEAST, say=lines.append) as watchdog:
        yield watchdog


def usual_steps(watchdog, first, last, seconds=USUAL):
    for step in range(first, last + 1):
        watchdog.beat(step)
        time.sleep(seconds)


def wait_on_a_dead_file_system(seconds=STUCK):
    threading.Event().wait(seconds)


def test_a_stuck_thread_is_named_with_its_stack(watchdog, lines, tmp_path):
    release = threading.Event()

    def train():
        usual_steps(watchdog, 0, 12)
        watchdog.beat(13)
        release.wait(20)

    training = threading.Thread(target=train, name="the training")
    training.start()
    file = tmp_path / "stacks/step_14.txt"
    until = time.monotonic() + 20
    while not lines and time.monotonic() < until:
        time.sleep(0.02)
    assert training.is_alive()  # told while it still hangs
    release.set()
    training.join()
    assert len(lines) == 1
    assert "step 14 has taken" in lines[0] and str(file) in lines[0]
    text = file.read_text()
    assert f"0x{training.ident:016x} is the training" in text
    stuck = text.split(f"Thread 0x{training.ident:016x}")[1].split("\n\n")[0]
    assert "in train" in stuck and __file__ in stuck


def test_each_slow_step_is_told_once(watchdog, lines, tmp_path):
    for first in (0, 80):
        usual_steps(watchdog, first, first + 70, seconds=0.0005)
        watchdog.beat(first + 71)
        wait_on_a_dead_file_system()
    assert [line.split(" has")[0] for line in lines] == ["warning: step 72", "warning: step 152"]
    assert {p.name for p in (tmp_path / "stacks").iterdir()} == {"step_72.txt", "step_152.txt"}


def test_what_happens_every_few_steps_is_told_the_first_time_only(watchdog, lines):
    for first in (0, 15, 30):
        usual_steps(watchdog, first, first + 13)
        watchdog.beat(first + 14)
        time.sleep(1.5 * LEAST)
    assert [line.split(" has")[0] for line in lines] == ["warning: step 15"]


def test_a_hang_of_an_earlier_start_is_kept(tmp_path, lines):
    (tmp_path / "stacks").mkdir()
    (tmp_path / "stacks/step_13_process_3.txt").write_text("of an earlier start")
    with Watchdog(tmp_path, 10.0, LEAST, lines.append, process=3) as watchdog:
        usual_steps(watchdog, 0, 11)
        watchdog.beat(12)
        wait_on_a_dead_file_system()
    assert (tmp_path / "stacks/step_13_process_3.txt").read_text() == "of an earlier start"
    assert "step 13 has taken" in (tmp_path / "stacks/step_13_process_3-2.txt").read_text()


@pytest.mark.parametrize("known", [1, 8])
def test_too_few_known_steps_say_nothing(watchdog, lines, known):
    # The first interval compiles, and does not count: `known` beats more are `known - 1` times.
    usual_steps(watchdog, 0, known)
    watchdog.beat(known + 1)
    wait_on_a_dead_file_system()
    assert bool(lines) == (known == 8)


def test_compilation_does_not_make_hangs_usual(watchdog, lines):
    watchdog.beat(0)
    time.sleep(2 * LEAST)
    usual_steps(watchdog, 1, 9)
    watchdog.beat(10)
    time.sleep(STUCK)
    assert len(lines) == 1


def test_what_is_paused_belongs_to_no_step(watchdog, lines):
    usual_steps(watchdog, 0, 12)
    watchdog.beat(13)
    with watchdog.paused():
        wait_on_a_dead_file_system()
        with watchdog.paused():
            wait_on_a_dead_file_system(USUAL)
        wait_on_a_dead_file_system(LEAST)
    watchdog.beat(14)
    assert not lines
    with watchdog.paused():
        pass
    wait_on_a_dead_file_system()
    assert len(lines) == 1  # a pause ends


def test_a_step_within_ten_times_the_usual_is_no_news(watchdog, lines):
    usual_steps(watchdog, 0, 10, seconds=0.04)
    watchdog.beat(11)
    time.sleep(1.5 * LEAST)  # more than the least, less than ten times the usual
    watchdog.beat(12)
    assert not lines


def test_a_host_that_runs_ahead_of_its_device_is_not_slow(tmp_path, lines):
    # Dispatching costs nothing until the numbers of a logged step are fetched, which waits for all.
    with Watchdog(tmp_path, 10.0, 0.05, lines.append) as watchdog:
        for step in range(6 * 20):
            watchdog.beat(step)
            if step % 20 == 19:
                time.sleep(0.12)
            if step == 65:
                lines.clear()  # before a whole window is known this cannot be told from a hang
        assert not lines
        watchdog.beat(120)
        time.sleep(1.0)
        assert len(lines) == 1  # a hang is seen all the same


def test_stacks_that_cannot_be_written_are_one_line(tmp_path, lines):
    (tmp_path / "stacks").write_text("a file in the way")
    with Watchdog(tmp_path, 10.0, LEAST, lines.append) as watchdog:
        usual_steps(watchdog, 0, 12)
        watchdog.beat(13)
        wait_on_a_dead_file_system()
    assert len(lines) == 1 and "could not be written" in lines[0] and "\n" not in lines[0]


def test_a_console_that_fails_ends_nothing(tmp_path):
    told = []

    def broken(line):
        told.append(line)
        raise ValueError("closed")

    with Watchdog(tmp_path, 10.0, LEAST, broken) as watchdog:
        for first in (0, 80):
            usual_steps(watchdog, first, first + 70, seconds=0.0005)
            watchdog.beat(first + 71)
            wait_on_a_dead_file_system()
    assert len(told) == 2


def test_the_thread_ends_with_the_run(tmp_path, lines):
    with pytest.raises(RuntimeError, match="of the training"), \
            Watchdog(tmp_path, 10.0, 600.0, lines.append) as watchdog:
        watchdog.beat(0)
        assert "watchdog" in {thread.name for thread in threading.enumerate()}
        raise RuntimeError("of the training")
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_beat_costs_microseconds(watchdog):
    def cost():
        start = time.perf_counter()
        for step in range(2000):
            watchdog.beat(step)
        return (time.perf_counter() - start) / 2000

    assert min(cost() for _ in range(5)) < 5e-6
