"""Numbers that are not finite: skipped on the device, gone back from, and given up on at last."""

import json
import signal

import numpy as np
import pytest
import tiny_run

from hippocampus.data.batches import ShuffledWindows
from hippocampus.errors import DataError, HippocampusError, Stopped
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training import loop
from hippocampus.training.loop import fit
from hippocampus.training.rollback import Rollbacks, dump
from hippocampus.training.signals import StopSignal

RUN = {"train__steps": 16, "log__every_steps": 1, "checkpoint__every_steps": 2,
       "checkpoint__keep_latest": 3, "guard__patience": 3, "guard__max_rollbacks": 2,
       "sample__max_new_tokens": 1}


@pytest.fixture
def poisoned(monkeypatch):
    """A function: the batches of these places in the data have a weight that is not a number."""
    real = ShuffledWindows.batch

    def poison(*places: int) -> list[int]:
        seen = []

        def batch(self, step, rows=None):
            made = real(self, step, rows)
            seen.append(step)
            if step in places:
                weight = made.loss_weight_BT.copy()
                weight[0, 3] = np.nan
                made = made.replace(loss_weight_BT=weight)
            return made

        monkeypatch.setattr(ShuffledWindows, "batch", batch)
        return seen

    return poison


def rows_of(folder, name: str) -> dict[int, float | None]:
    return {row["step"]: row[name] for row in read_metrics(folder / "metrics.jsonl") if name in row}


def test_a_bad_batch_costs_its_own_step_only(tmp_path, poisoned, capsys):
    poisoned(5)
    folder = fit(tiny_run.config(**RUN), tmp_path / "run")
    losses = rows_of(folder, "train/loss")
    assert losses[6] is None and all(loss for step, loss in losses.items() if step != 6)
    assert set(losses) == set(range(1, 17))
    assert rows_of(folder, "train/skipped")[16] == 1
    assert not (folder / "rollbacks.json").exists()
    assert "warning: at step 6, 1 step had to be skipped, 1 in a row until now: loss nan" in (
        capsys.readouterr().out)


def test_too_many_in_a_row_go_back_past_the_batches_and_saving_works_again(tmp_path, poisoned,
                                                                           capsys):
    seen = poisoned(*range(7, 11))  # the batches of the steps 8 to 11
    folder = fit(tiny_run.config(**RUN), tmp_path / "run")
    (record,) = json.loads((folder / "rollbacks.json").read_text())
    # The steps 8, 9 and 10 were skipped; seen one step late, after step 11.
    assert record["to"] == 6 and record["at"] in (10, 11)
    assert record["offset"] == record["at"] - 6
    printed = capsys.readouterr().out
    assert f"warning: going back from step {record['at']} to 6 and past the batches" in printed
    losses = rows_of(folder, "train/loss")
    assert set(losses) == set(range(1, 17))
    at_last = rows_of(folder, "train/skipped_in_a_row")[16]
    assert at_last == 0 and all(losses[step] for step in range(13, 17))
    # Nothing was lost, and the numbers that were gone back over could be saved again.
    names = {path.name for path in (folder / "steps").iterdir()}
    assert {"14", "16"} <= names and not any(name.endswith(".damaged") for name in names)
    # After the way back the run read on behind the batches that it had seen.
    assert max(seen) >= 15 + record["offset"]
    dumped = json.loads(next((folder / "bad_batches").glob("*.json")).read_text())
    assert dumped["train/loss"] == "nan" and dumped["train/skipped_in_a_row"] >= 3
    arrays = np.load(next((folder / "bad_batches").glob("*.npz")), allow_pickle=False)
    assert np.isnan(arrays["loss_weight_BT"]).any() and arrays["tokens_BT"].shape == (8, 16)


def test_a_run_that_does_not_recover_ends_with_its_numbers_and_its_checkpoints(tmp_path, poisoned):
    poisoned(*range(7, 1000))
    with pytest.raises(HippocampusError, match="does not recover") as caught:
        fit(tiny_run.config(**RUN), tmp_path / "run")
    assert caught.value.exit_code == 1 and "guard.max_rollbacks" in caught.value.hint
    records = json.loads((tmp_path / "run" / "rollbacks.json").read_text())
    # Nothing was saved after the first way back, so the second one goes further.
    assert [record["to"] for record in records] == [6, 4]
    assert records[1]["offset"] > records[0]["offset"]
    from hippocampus.runs.checkpoints import Checkpoints

    with Checkpoints(tmp_path / "run" / "steps") as checkpoints:
        assert checkpoints.latest == 4
    dumped = sorted((tmp_path / "run" / "bad_batches").glob("*.json"))
    assert len(dumped) >= 1
    statistics = json.loads(dumped[0].read_text())["parameters"]
    assert all(found["not_finite"] == 0 for found in statistics.values())


def test_without_a_checkpoint_the_run_begins_again_behind_the_batches(tmp_path, poisoned):
    poisoned(0, 1, 2, 3)
    folder = fit(tiny_run.config(**{**RUN, "checkpoint__every_steps": 100}), tmp_path / "run")
    (record,) = json.loads((folder / "rollbacks.json").read_text())
    assert record["to"] == 0
    assert rows_of(folder, "train/skipped")[16] <= 1


@pytest.mark.full
def test_a_run_killed_after_going_back_reads_the_same_batches(tmp_path, poisoned, monkeypatch):
    poisoned(*range(7, 11))
    config = tiny_run.config(**RUN)
    whole = fit(config, tmp_path / "whole")
    real = loop._step

    def step(run, state, step, batch, compiles):
        if step == 8 and run.folder.rollbacks.exists():
            raise KeyboardInterrupt
        return real(run, state, step, batch, compiles)

    monkeypatch.setattr(loop, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / "killed")
    monkeypatch.setattr(loop, "_step", real)
    fit(config, tmp_path / "killed")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert rows_of(tmp_path / "killed", name) == rows_of(whole, name)


class StopAt(StopSignal):
    """A signal that is noticed at one of the places where a run could stop."""

    def __init__(self, call: int):
        super().__init__()
        self._at = call

    def here(self):
        super().here()
        if self._calls >= self._at:
            self._wanted = signal.SIGTERM
        return self._wanted


@pytest.mark.full
def test_signal_where_a_save_was_left_out_waits_for_a_step_that_is_saved(tmp_path, poisoned):
    poisoned(5)  # step 6, where a save was due: calls 1, 2, 3 (saved), 4, 5, 6 (saved), 7, 8
    with StopAt(9) as stop, pytest.raises(Stopped, match="at step 7: everything is saved"):
        fit(tiny_run.config(**RUN), tmp_path / "run", stop=stop)
    assert (tmp_path / "run" / "steps" / "7").is_dir()
    assert not (tmp_path / "run" / "steps" / "6").exists()
    fit(tiny_run.config(**RUN), tmp_path / "run")
    assert set(rows_of(tmp_path / "run", "train/loss")) == set(range(1, 17))


# ---------------------------------------------------------------- which batch a step reads

def test_offset_of_a_step_is_that_of_the_newest_record_that_covers_it(tmp_path):
    rollbacks = Rollbacks(tmp_path / "rollbacks.json").add(at=120, to=100)
    assert [rollbacks.offset(step) for step in (0, 99, 100, 119, 500)] == [0, 0, 20, 20, 20]
    further = rollbacks.add(at=110, to=50)  # reads as far as 110 + 20
    assert [further.offset(step) for step in (49, 50, 100)] == [0, 80, 80]
    later = rollbacks.add(at=150, to=130)
    assert [later.offset(step) for step in (99, 100, 129, 130)] == [0, 20, 20, 40]
    assert Rollbacks.read(tmp_path / "rollbacks.json").records == later.records


def test_no_batch_before_the_way_back_comes_again(tmp_path):
    class Places:
        def batch(self, step, rows=None):
            return step

    rollbacks, places = Rollbacks(tmp_path / "r.json"), Places()
    assert rollbacks.source(places) is places
    rollbacks = rollbacks.add(at=12, to=8).add(at=10, to=4)
    source = rollbacks.source(places)
    # 12 + 0 were read, then 8 + 4 .. 9 + 4; the next one is 14.
    assert [source.batch(step) for step in (3, 4, 5)] == [3, 14, 15]


@pytest.mark.parametrize("content", [
    "{", '[{"at": 1}]', '[{"at": 1, "to": 0, "offset": "x"}]', "7"])
def test_a_damaged_record_is_refused_rather_than_forgotten(tmp_path, content):
    (tmp_path / "rollbacks.json").write_text(content)
    with pytest.raises(DataError, match="is damaged"):
        Rollbacks.read(tmp_path / "rollbacks.json")


def test_dump_is_valid_json_whatever_the_numbers(tmp_path):
    batch = tiny_run_batch()
    dump(tmp_path / "bad" / "step_3.json", batch,
         {"loss": float("inf"), "parameters": {"a": {"largest": 2.0, "not_finite": 1}}})
    assert json.loads((tmp_path / "bad" / "step_3.json").read_text()) == {
        "loss": "inf", "parameters": {"a": {"largest": 2.0, "not_finite": 1.0}}}
    arrays = np.load(tmp_path / "bad" / "step_3.npz", allow_pickle=False)
    assert set(arrays.files) == {"tokens_BT", "targets_BT", "loss_weight_BT"}


def tiny_run_batch():
    from hippocampus.data.batches import Batch

    ids = np.zeros((2, 3), np.int32)
    return Batch(ids, ids, np.ones((2, 3), np.float32))
