"""The compiled step of an earlier start is found again, and only where it is the same step."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.config import MeshConfig
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training import kept_step, sharding
from hippocampus.training.kept_step import KeptStep

SMALL = {"model__paths": ("ssm",), "model__n_layers": 1, "train__steps": 2,
         "log__every_steps": 1, "eval__max_windows": 1, "sample__max_new_tokens": 1}
LISTENING = """import sys, threading
import jax
class Told(threading.Thread):
    def start(self):
        if self.name == "reads the step":
            print("@ reading_begins_after_the_framework",
                  "hippocampus.training.loop" in sys.modules, "step")
        super().start()
threading.Thread = Told
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **about: print("@", event.rsplit("/", 1)[-1], about.get("fun_name")))
from hippocampus.train import main
from hippocampus.verbs import run_verb
run_verb(main)
"""


def start(workdir: Path, folder: Path) -> list[str]:
    """What JAX did with the step in a run of two steps; PyTorch is there, and nobody needs it."""
    arguments = tiny_run.command(workdir, **SMALL)[3:]
    packages = folder.parent / "packages"
    packages.mkdir(exist_ok=True)
    (packages / "torch.py").write_text(
        "import pathlib; pathlib.Path(__file__ + '.imported').touch()")
    environment = tiny_run.environment()
    environment["PYTHONPATH"] += os.pathsep + str(packages)
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, *arguments], capture_output=True, text=True,
        env={**environment, "JAX_COMPILATION_CACHE_DIR": str(folder)})
    assert done.returncode == 0, done.stderr
    assert not (packages / "torch.py.imported").exists()
    return [" ".join(line.split()[1:-1]) for line in done.stdout.splitlines()
            if line.startswith("@") and line.split()[-1] in ("step", "jit(step)")]


def test_a_later_start_traces_no_step(tmp_path):
    folder = tmp_path / "compiled"
    folder.mkdir(mode=0o700)
    assert "jaxpr_trace_duration" in start(tmp_path / "one", folder)
    # Read once, and before most of the framework is imported.
    assert start(tmp_path / "two", folder) == ["reading_begins_after_the_framework False"]
    rows = [[{name: value for name, value in row.items() if name in ("step", "train/loss")}
             for row in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert rows[0] == rows[1] and len(rows[0]) > 1


def step(state, batch):
    key, use = jax.random.split(state["key"])
    noise = jax.random.normal(use, batch.shape)
    return {"key": key, "sum": state["sum"] + batch + noise}, {"b": batch.sum(), "a": noise.max()}


@pytest.fixture
def made(tmp_path):
    """A function that makes a `KeptStep` and what to call it with."""
    traces = []

    def counted(state, batch):
        traces.append(batch.shape)
        return step(state, batch)

    def make(n=4):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
        state = {"key": jax.random.key(1), "sum": jnp.zeros((n,))}
        def part(state, batch):
            return counted(state, batch)

        kept = KeptStep(tmp_path / "steps" / "abc", mesh)
        return kept.around(jax.jit(part, donate_argnums=0), part), state, jnp.arange(float(n))

    def settle():
        for thread in threading.enumerate():
            if "step" in thread.name:
                thread.join()

    return make, settle, traces


def test_what_is_read_gives_the_same_bits_and_takes_the_states_arrays(made):
    make, settle, traces = made
    results = []
    for _ in range(2):
        kept, state, batch = make()
        first = state["sum"]
        for _ in range(3):
            state, metrics = kept(state, batch)
        assert first.is_deleted()
        results.append([np.asarray(state["sum"]), jax.random.key_data(state["key"]),
                        metrics["a"], metrics["b"]])
        settle()
    assert len(traces) == 1
    assert all(np.array_equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "no header", "other shape"])
def test_a_file_that_does_not_fit_is_as_if_it_were_not_there(made, tmp_path, harm):
    make, settle, traces = made
    kept, state, batch = make()
    kept(state, batch)
    settle()
    path = tmp_path / "steps" / "abc"
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[-100] ^= 1
    path.write_bytes({"cut": content[:-10], "empty": b"", "no header": b"x\n\n"}.get(
        harm, bytes(content)))
    kept, state, batch = make(5 if harm == "other shape" else 4)
    state, metrics = kept(state, batch)
    assert metrics["b"] == batch.sum() and len(traces) == 2
    settle()
    make(batch.size)[0](*make(batch.size)[1:])
    assert len(traces) == 2  # it was written anew


def test_the_digest_is_that_of_all_code_outside_of_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "train()"])
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "my_layers_of_a_test.py"
    path.write_text("x = 1\n")
    before = kept_step.Process.now().code
    __import__(path.stem)
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    assert kept_step.Process.now().code == before
    __import__(path.stem)
    imported = kept_step.Process.now().code
    path.write_text("x = 2\n")
    changed = kept_step.Process.now().code
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "patch(); train()"])
    assert len({before, imported, changed, kept_step.Process.now().code}) == 4


def test_another_version_of_a_package_is_another_digest(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "train()"])
    monkeypatch.syspath_prepend(tmp_path)
    digests = [kept_step.Process.now().code]
    for version in ("1.0", "1.1"):
        (tmp_path / f"some_package-{version}.dist-info").mkdir()
        digests.append(kept_step.Process.now().code)
        (tmp_path / f"some_package-{version}.dist-info").rmdir()
    assert len(set(digests)) == 3 and kept_step.Process.now().code == digests[0]


def test_settings_and_config_are_part_of_the_name(tmp_path, monkeypatch):
    (tmp_path / "xla").mkdir(mode=0o700)
    monkeypatch.setattr(kept_step, "private_folder", lambda: tmp_path / "xla")
    monkeypatch.setattr(kept_step, "_digest_of_code", lambda modules: "the same")
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])

    def name(config):
        return kept_step.kept_step(config, mesh).path.name

    config = tiny_run.config()
    names = [name(config), name(tiny_run.config(loss__label_smoothing=0.1))]
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    names.append(name(config))
    with jax.numpy_dtype_promotion("strict"):
        names.append(name(config))
    monkeypatch.setenv("HIPPOCAMPUS_CACHE", "elsewhere")  # of no effect on a program
    assert len(set(names)) == 4 and name(config) == names[2]


def test_nothing_is_kept_where_code_need_not_lie_in_files(monkeypatch):
    # This test, for one: it may have replaced anything.
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    assert kept_step.Process.now().code is None


def test_only_the_newest_files_stay(made, tmp_path, monkeypatch):
    make, settle, _ = made
    monkeypatch.setattr(kept_step, "KEPT", 2)
    (tmp_path / "steps").mkdir()
    for name in ("a0", "a1"):
        (tmp_path / "steps" / name).write_bytes(b"old")
    kept, state, batch = make()
    kept(state, batch)
    settle()
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["a1", "abc"]
