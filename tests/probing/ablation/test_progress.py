from hippocampus.probing.ablation.progress import common_target, evaluations, reached


def rows(*losses, every=10, per_step=0.5):
    """A run that is evaluated and logged every so many steps, each step of half a second."""
    found = []
    for i, loss in enumerate(losses, start=1):
        step = i * every
        found.append({"step": step, "train/loss": 9.0, "time/training": per_step * step - 1,
                      "time/data": 1.0, "time/compile": 30.0, "time/evaluation": 7.0})
        found.append({"step": step, "eval/loss": loss})
    return found


def test_a_loss_is_reached_at_the_first_evaluation_that_is_low_enough():
    found = reached(rows(3.0, 2.0, 2.2, 1.0), 2.1, tokens_per_step=64)
    assert (found.step, found.tokens) == (20, 20 * 64)


def test_seconds_are_training_and_waiting_for_data_and_nothing_else():
    assert reached(rows(3.0, 2.0), 2.0, 1).seconds == 10.0


def test_seconds_between_two_logged_steps_are_interpolated():
    run = [row for row in rows(3.0, 2.5, 2.0) if row["step"] != 20 or "eval/loss" in row]
    assert reached(run, 2.5, 1).seconds == 10.0


def test_a_loss_that_is_not_reached_is_not():
    assert reached(rows(3.0, 2.0), 1.9, 1) is None
    assert reached([], 1.9, 1) is None


def test_a_run_without_an_account_of_time_has_no_seconds():
    assert reached([{"step": 5, "eval/loss": 1.0}], 1.0, 1).seconds is None


def test_the_common_target_is_the_best_loss_of_the_worst_run():
    runs = [rows(3.0, 1.5, 1.8), rows(2.0, 1.9), rows(5.0, 1.2)]
    target = common_target(runs)
    assert target == 1.9
    assert all(reached(run, target, 1) for run in runs)


def test_there_is_no_common_target_where_a_run_was_never_evaluated():
    assert common_target([rows(3.0), [{"step": 1, "train/loss": 2.0}]]) is None
    assert common_target([]) is None


def test_evaluations_that_are_not_finite_do_not_count():
    assert evaluations(rows(float("nan"), 2.0, float("inf"))) == [(20, 2.0)]
