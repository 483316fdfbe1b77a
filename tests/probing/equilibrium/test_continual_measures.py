"""Tasks in a row: the numbers of a matrix that is known, the tasks, and what a mask holds still."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.ops.cross_entropy import Head
from hippocampus.probing.equilibrium.continual import mixed, permuted_tasks, summary, teach

pytestmark = pytest.mark.usefixtures("quick_compiles")

V, LENGTH = 12, 8
IDS = np.random.default_rng(0).permuted(np.tile(np.arange(V), 60)).astype(np.int32)
IDS = np.where(IDS == 7, 3, IDS)  # an id that the text does not have


@dataclass(frozen=True)
class Bigrams:
    """Predicts each token from the one before it: a table of states, and one of outputs."""

    def apply(self, variables, batch, method):
        return variables["params"]["states"][batch.tokens_BT], {}, {}

    def head(self, params):
        return Head(params["out"], vocab_size=V)


def parameters():
    draw = np.random.default_rng(1)
    return {name: jnp.asarray(0.1 * draw.standard_normal((V, 16)), jnp.float32)
            for name in ("states", "out")}


# ---------------------------------------------------------------- numbers

MATRIX = np.asarray([  # own text, task 1, task 2
    [0.9, 0.1, 0.2],
    [0.5, 0.8, 0.3],
    [0.4, 0.2, 0.7]])


def test_forgetting_and_transfer_of_a_known_matrix():
    found = summary(MATRIX, [1, 2])
    assert found.learned == pytest.approx((0.7 + 0.4) / 2)
    assert found.final == pytest.approx((0.4 + 0.2 + 0.7) / 3)
    assert found.forgetting == pytest.approx(((0.9 - 0.4) + (0.8 - 0.2)) / 2)
    assert found.forward == pytest.approx(0.3 - 0.2)


def test_one_lesson_has_nothing_before_it_that_could_help():
    found = summary(MATRIX[:2, :2], [1])
    assert found.learned == pytest.approx(0.7) and found.forgetting == pytest.approx(0.4)
    assert np.isnan(found.forward)


# ---------------------------------------------------------------- tasks

def test_tasks_are_one_text_under_permutations_of_the_ids_that_it_has():
    tasks = permuted_tasks(IDS, 3, rows=16, measured=5, length=LENGTH, seed=0)
    own, *others = tasks
    assert [task.name for task in tasks] == ["own text", *(f"permutation {i}" for i in (1, 2, 3))]
    assert own.learned.shape == (16, LENGTH + 1) and own.measured.shape == (5, LENGTH + 1)
    for task in others:
        pairs = {*zip(own.learned.ravel(), task.learned.ravel(), strict=True),
                 *zip(own.measured.ravel(), task.measured.ravel(), strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert 7 not in task.learned and not np.array_equal(task.learned, own.learned)
    assert not np.array_equal(tasks[1].learned, tasks[2].learned)


def test_what_is_measured_was_not_learned():
    ids = np.arange(20 * LENGTH + 1, dtype=np.int32)  # every passage has ids of its own
    own = permuted_tasks(ids, 1, rows=50, measured=4, length=LENGTH, seed=0)[0]
    assert not set(own.learned[:, :-1].ravel()) & set(own.measured[:, :-1].ravel())
    assert len(own.learned) == 50  # passages come again where the text is short


def test_mixed_lessons_have_as_many_rows_of_every_task():
    tasks = permuted_tasks(IDS, 3, rows=16, measured=5, length=LENGTH, seed=0)[1:]
    lessons = mixed(tasks, rows=8)
    assert [len(lesson) for lesson in lessons] == [16] * 3
    every = {tuple(row) for lesson in lessons for row in lesson}
    for task in tasks:
        assert {tuple(row) for row in task.learned} <= every


# ---------------------------------------------------------------- teaching

@pytest.fixture(scope="module")
def course():
    tasks = permuted_tasks(np.tile(np.arange(V), 80).astype(np.int32), 2, rows=96, measured=8,
                           length=LENGTH, seed=0)
    lessons = [task.learned for task in tasks[1:]]

    def taught(**mask):
        params = parameters()
        masks = {name: np.float32(mask.get(name, 1)) for name in params}
        return params, teach(Bigrams(), params, masks, lessons, tasks, rows=8, rate=0.3)

    return taught


def test_a_task_is_learned_in_its_lesson_and_forgotten_in_the_next(course):
    params, (accuracy, loss) = course()
    assert accuracy.shape == loss.shape == (3, 3)
    assert accuracy[1, 1] == accuracy[2, 2] == 1 and accuracy[0].max() < 0.6
    assert accuracy[2, 1] < 0.5 and loss[2, 1] > loss[1, 1]
    assert all(np.array_equal(params[name], value) for name, value in parameters().items())


def test_what_is_masked_stays_as_it_is(course):
    _, (accuracy, loss) = course(states=0, out=0)
    assert (accuracy == accuracy[0]).all() and (loss == loss[0]).all()
    _, (_, half) = course(states=0)
    assert half[1, 1] < loss[0, 1]
