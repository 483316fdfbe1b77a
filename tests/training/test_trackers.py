"""Where the numbers of a run end up."""

import errno
import os
import sys
import types

import numpy as np
import pytest

from hippocampus.errors import ConfigError
from hippocampus.runs.run_folder import RunFolder, read_metrics
from hippocampus.training.trackers import (
    JsonLines,
    TensorBoard,
    Trackers,
    WeightsAndBiases,
    _absent,
)


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is given."""
    module = types.ModuleType("wandb")
    module.inits, module.rows = [], []

    class Run:
        def log(self, values, step):
            module.rows.append((step, values))

        def finish(self):
            module.rows.append("finished")

    def init(**arguments):
        module.inits.append(arguments)
        return Run()

    module.init, module.util = init, types.SimpleNamespace(generate_id=lambda: "id-1")
    module.Histogram, module.Html = (lambda values: ("histogram", len(values))), str
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_that_goes_on_keeps_its_wandb_id(wandb, tmp_path):
    for _ in range(2):
        tracker = WeightsAndBiases("project", RunFolder(tmp_path), {"a": 1})
        tracker.scalars(3, {"train/loss": 1.0})
        tracker.text(3, "sample", "<b>")
        tracker.close()
        wandb.util.generate_id = lambda: "id-2"
    assert [arguments["id"] for arguments in wandb.inits] == ["id-1", "id-1"]
    assert wandb.inits[0]["project"] == "project" and wandb.inits[0]["resume"] == "allow"
    assert wandb.rows[0] == (3, {"train/loss": 1.0})
    assert wandb.rows[1] == (3, {"sample": "<pre>&lt;b&gt;</pre>"})
    assert wandb.rows[2] == "finished"


def test_wandb_without_the_package_is_one_line_and_a_hint(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed") as caught:
        WeightsAndBiases("project", RunFolder(tmp_path), {})
    assert "hippocampus[wandb]" in caught.value.hint


def test_a_package_that_is_kept_out_can_be_imported_before_and_after(monkeypatch):
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with _absent("wave"), pytest.raises(ImportError):
        import wave
    import wave

    with _absent("wave"):
        import wave as again
    assert again is wave and sys.modules["wave"] is wave


def test_a_loss_that_is_not_finite_leaves_valid_json(tmp_path):
    tracker = JsonLines(tmp_path / "metrics.jsonl")
    tracker.scalars(1, {"train/loss": float("nan"), "train/grad_norm": float("inf")})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": None, "train/grad_norm": None}]
    tracker.close()


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    trackers = Trackers([JsonLines(tmp_path / "metrics.jsonl")])
    trackers.scalars(1, {"train/loss": 2.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": 2.5}]
    trackers.close()


class FullDisk:
    """A file that takes a part of what it is given, until there is room again."""

    def __init__(self, file):
        self._file, self.full = file, True

    def write(self, content: bytes) -> int:
        if not self.full:
            return self._file.write(content)
        self._file.write(content[:len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_rows_that_a_full_disk_refused_come_when_there_is_room_again(tmp_path):
    lines, said = JsonLines(tmp_path / "metrics.jsonl"), []
    trackers = Trackers([lines], said.append)
    trackers.scalars(1, {"train/loss": 1.0})
    lines._file = FullDisk(lines._file)
    for step in (2, 3):
        trackers.scalars(step, {"train/loss": float(step)})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n"), "half a row is left"
    assert said == ["warning: numbers could not be written to JsonLines: No space left on device; "
                    "training goes on"]
    lines._file.full = False
    trackers.scalars(4, {"train/loss": 4.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    lines._file.full = True
    trackers.scalars(5, {"train/loss": 5.0})
    assert len(said) == 2  # told again after it had worked


def test_event_files_survive_a_disk_that_takes_nothing(tmp_path):
    board = TensorBoard(tmp_path, 1)
    board.scalars(1, {"train/loss": 1.0})
    board.close()

    class Broken:
        def write_event(self, event):
            raise OSError(errno.ENOSPC, "full")

    board._file = Broken()
    said = []
    trackers = Trackers([board], said.append)
    trackers.scalars(2, {"train/loss": 2.0})  # neither raises nor waits
    trackers.scalars(3, {"train/loss": 3.0})
    trackers.close()
    assert len(said) == 1
    assert len(list(tmp_path.glob("events.*"))) == 2  # behind half an event nothing can be read


def test_histogram_leaves_out_what_is_not_finite(tmp_path):
    board = TensorBoard(tmp_path, 1)
    board.histogram(1, "gates", np.asarray([0.1, np.nan, 0.9, np.inf]))
    board.histogram(2, "gates", np.asarray([np.nan]))
    board.close()
    (file,) = tmp_path.glob("events.*")
    assert file.read_bytes().count(b"gates") == 1
