"""A long run holds no more at its end than after its warm-up, and compiles nothing again."""

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import soak
import tiny_run

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")

OBJECTS_PER_STEP = 4.0
"""A batch or a row of metrics that is kept is ten and more; the noise between two looks is two."""
KIB_PER_STEP = 1.0
"""Half of a batch of the tiny model. What the allocator keeps is handed back before each look."""
KIB_PER_ROUND = 256.0
"""Of 100 steps with one save, measured at 170 in 5,000 steps. Most of what Python can see of it is
leaked by tensorstore 0.1.86, a few strings for each array of each save: `Spec.to_json()` and
`experimental_collect_matching_metrics()` never let go of what their answers hold."""
KIB_OF_NOISE = 3 * 1024.0
"""A look moves by one to two MiB, up and down, with the threads that save at that moment."""


def soaked(workdir, steps):
    done = subprocess.run([sys.executable, soak.__file__, workdir, str(steps)],
                          capture_output=True, text=True, env=tiny_run.environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    samples = json.loads(done.stdout.splitlines()[-1])
    assert [s["step"] for s in samples] == list(range(25, steps + 1, soak.EVERY))
    return samples


@pytest.fixture(scope="module", params=[800, pytest.param(10_000, marks=pytest.mark.full)])
def samples(request, tmp_path_factory):
    return soaked(tmp_path_factory.mktemp("soak") / "run", request.param)


def second_half(samples):
    return samples[len(samples) // 2:]


def growth(samples, name):
    """Of each pair of looks between which there were steps and nothing else, per step."""
    rest = (soak.ALL_EVERY // 2, soak.ALL_EVERY - soak.EVERY)  # saves are written for a while
    return [(b[name] - a[name]) / soak.EVERY for a, b in pairwise(samples)
            if a["step"] % soak.ALL_EVERY in rest]


def least(samples, name):
    """Over a quarter, because a save that is going on holds files and arrays for a moment."""
    return min(s[name] for s in samples)


def quarters(samples):
    n = len(samples) // 4
    return samples[n:2 * n], samples[3 * n:]


def test_nothing_is_compiled_after_two_rounds(samples):
    rounds = [s for s in samples if s["step"] > 2 * soak.ALL_EVERY]
    assert {s["compiled"] for s in rounds} == {rounds[0]["compiled"]}
    assert rounds[0]["compiled"] > 0  # they can be counted


def test_a_step_keeps_no_object_and_no_memory(samples):
    assert statistics.median(growth(second_half(samples), "blocks")) < OBJECTS_PER_STEP
    # On a machine that takes pages away and gives them back, looks move by tens of KiB a step, up
    # and down. What a step keeps lifts all of them.
    assert statistics.quantiles(growth(second_half(samples), "resident_kib"))[0] < KIB_PER_STEP


def grows(samples):
    """Whether memory grows by more than is known of over the second half."""
    first, *_, last = second_half(samples)
    rounds = (last["step"] - first["step"]) / soak.ALL_EVERY
    allowed = KIB_PER_ROUND * rounds + KIB_OF_NOISE
    return last["resident_kib"] - first["resident_kib"] >= allowed


def test_memory_is_flat(samples, tmp_path):
    # A leak is in every run. Of eight runs without one, one had looks that were 4 MiB apart.
    assert not grows(samples) or not grows(soaked(tmp_path / "run", samples[-1]["step"]))


@pytest.mark.parametrize(("name", "spare"), [("fds", 2), ("arrays", 0)])
def test_files_and_arrays_are_let_go(samples, name, spare):
    early, late = quarters(samples)
    assert least(late, name) <= least(early, name) + spare


@pytest.mark.parametrize("name", ["metrics_bytes", "tensorboard_bytes"])
def test_files_grow_with_the_steps_and_not_faster(samples, name):
    early, late = ((q[-1][name] - q[0][name]) / (q[-1]["step"] - q[0]["step"])
                   for q in quarters(samples))
    assert early > 0
    assert late == pytest.approx(early, rel=0.15)
