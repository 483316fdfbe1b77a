"""What docs/distributed.md says of object stores, on a local one that has whole objects only."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError
from hippocampus.runs.checkpoints import Checkpoints, abstract
from hippocampus.runs.run_folder import cut_metrics, read_metrics

TREES = {step: {"x": jnp.arange(5.0) + step} for step in (1, 2)}
MARK = "commit_success.txt"


class ObjectStore:
    """Keys and whole objects: no rename, no append, no lock; an object appears at once."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}

    def put(self, key: str, content: bytes, *, if_absent: bool = False) -> bool:
        if if_absent and key in self.objects:
            return False
        self.objects[key] = content
        return True

    def copy_to(self, folder: Path) -> Path:
        for key, content in self.objects.items():
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps as (key, content), in the order of names."""
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, CheckpointConfig(keep_latest=9)) as checkpoints:
        for step, tree in TREES.items():
            checkpoints.save(step, {"params": tree}, None)
    found = [(str(path.relative_to(folder)), path.read_bytes())
             for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {f"{step}/{MARK}" for step in TREES} <= {key for key, _ in found}
    return found


def steps_of(folder):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.steps


def restored(folder, step):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(step, {"params": abstract(TREES[step])})["params"]


def test_a_step_counts_when_its_mark_is_there_and_not_before(saved, tmp_path):
    """Orbax writes the mark last; an upload may end after any object."""
    first = [pair for pair in saved if not pair[0].startswith("2/")]
    second = sorted((pair for pair in saved if pair[0].startswith("2/")),
                    key=lambda pair: pair[0] == f"2/{MARK}")
    assert second[-1][0] == f"2/{MARK}"
    for ended_after in range(len(second) + 1):
        store = ObjectStore()
        for key, content in first + second[:ended_after]:
            store.put(key, content)
        folder = store.copy_to(tmp_path / str(ended_after))
        whole = [1, 2] if ended_after == len(second) else [1]
        assert steps_of(folder) == whole, f"after {ended_after} of {len(second)} objects"
    for step in (1, 2):
        np.testing.assert_array_equal(restored(folder, step)["x"], TREES[step]["x"])


def test_a_step_whose_mark_came_before_its_data_is_refused_in_one_line(saved, tmp_path):
    """A copy by another tool has an order of its own."""
    store = ObjectStore()
    for key, content in saved:
        data = key.startswith("2/params/") and ("/d/" in key or "manifest" in key)
        if not data:
            store.put(key, content)
    folder = store.copy_to(tmp_path / "run")
    assert steps_of(folder) == [1, 2]
    with pytest.raises(CheckpointError, match="step 2 could not be restored") as caught:
        restored(folder, 2)
    assert "\n" not in caught.value.message
    np.testing.assert_array_equal(restored(folder, 1)["x"], TREES[1]["x"])


def test_cutting_the_metrics_is_a_whole_rewrite(tmp_path):
    rows = [{"step": step, "train/loss": 1 / step} for step in range(1, 6)]
    store = ObjectStore()
    store.put("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()[:-9])
    path = store.copy_to(tmp_path) / "metrics.jsonl"
    assert read_metrics(path) == rows[:4]  # the last row was torn
    cut_metrics(path, 3)
    store.put("metrics.jsonl", path.read_bytes())
    assert read_metrics(store.copy_to(tmp_path / "again") / "metrics.jsonl") == rows[:3]


def test_a_lock_made_of_an_object_outlives_its_holder():
    """Why there is none: a killed run could not be told from one that goes on."""
    store = ObjectStore()
    assert store.put(".lock", b"process 1", if_absent=True)
    assert not store.put(".lock", b"process 2", if_absent=True)  # also when process 1 was killed
    assert store.objects[".lock"] == b"process 1"
