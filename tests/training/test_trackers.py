"""Where the numbers of a run end up."""

import sys
import types

import pytest

from hippocampus.errors import ConfigError
from hippocampus.runs.run_folder import RunFolder, read_metrics
from hippocampus.training.trackers import JsonLines, Trackers, WeightsAndBiases


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
