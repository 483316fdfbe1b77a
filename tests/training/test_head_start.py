"""What a start begins beside its imports: when, with what, and what it leaves to the run."""

import dataclasses
import importlib.util
import subprocess
import sys
import threading
import time

import jax
import pytest
import tiny_run

from hippocampus import distributed
from hippocampus.errors import ConfigError
from hippocampus.training import head_start, kept_step
from hippocampus.training.head_start import HeadStart, begin, settle

HEAVY = ("flax", "optax", "orbax", "grain", "rich", "tokenizers", "tensorboardX", "datasets",
         "transformers", "matplotlib", "pandas", "pyarrow", "scipy", "wandb",
         "hippocampus.models", "hippocampus.backbones", "hippocampus.training.loop")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for compiled programs; this test counts as a program in files."""
    (tmp_path / "xla").mkdir(mode=0o700)
    monkeypatch.setattr(kept_step, "private_folder", lambda: tmp_path / "xla")
    monkeypatch.setattr(kept_step, "_digest_of_code", lambda modules: str(sorted(modules)))
    return tmp_path / "xla"


@pytest.fixture
def config():
    return tiny_run.config()


def test_what_begins_first_needs_little_and_does_nothing_when_imported():
    code = ("import sys, threading, hippocampus.training.head_start as module\n"
            "from jax._src import xla_bridge\n"
            f"print([name for name in {HEAVY!r} if name in sys.modules],\n"
            "      xla_bridge.backends_are_initialized(), threading.active_count())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=tiny_run.environment())
    assert done.stdout.strip() == "[] False 1"


def test_what_is_imported_meanwhile_is_there():
    assert all(importlib.util.find_spec(name) for name in head_start._PIECES)


def test_the_step_that_is_read_is_the_runs(folder, config):
    ahead = HeadStart(config)
    begun = ahead._begun.result()
    assert begun is not None and ahead.kept_step(*settle(config)) is begun


def test_what_the_data_change_is_another_step(folder, config):
    ahead = HeadStart(config)
    resolved, mesh = settle(config)
    changed = dataclasses.replace(resolved, model=dataclasses.replace(
        resolved.model, vocab_size=resolved.model.vocab_size + 1))
    found = ahead.kept_step(changed, mesh)
    assert found.path == kept_step.kept_step(changed, mesh).path != ahead._begun.result().path


def test_code_that_is_imported_later_is_part_of_the_name(folder, config, tmp_path, monkeypatch):
    ahead = HeadStart(config)
    path = tmp_path / "a_layer_of_a_test.py"
    path.write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__(path.stem)
    found = ahead.kept_step(*settle(config))
    monkeypatch.delitem(sys.modules, path.stem)
    assert found.path != ahead._begun.result().path == kept_step.kept_step(*settle(config)).path


def test_python_is_left_to_the_reading_until_xla_has_the_program(config, monkeypatch):
    class Reading:
        is_lowered = threading.Event()

    def slow(*_):
        threading.Timer(0.5, Reading.is_lowered.set).start()
        return Reading

    monkeypatch.setattr(head_start, "kept_step", slow)
    monkeypatch.setattr(head_start.importlib, "import_module", lambda name: None)
    HeadStart(config)
    assert Reading.is_lowered.is_set()


def test_the_next_imports_wait_for_no_device(config, monkeypatch):
    imported = []
    found = jax.devices()

    def slow():
        deadline = time.monotonic() + 20
        while imported != list(head_start._PIECES) and time.monotonic() < deadline:
            time.sleep(0.01)
        return found

    monkeypatch.setattr(jax, "devices", slow)
    monkeypatch.setattr(head_start.importlib, "import_module", imported.append)
    HeadStart(config)
    assert imported == list(head_start._PIECES)


def test_devices_that_fail_are_left_for_the_run_to_say(folder, config, monkeypatch):
    def fail():
        raise RuntimeError("no such device")

    monkeypatch.setattr(jax, "devices", fail)
    said = []
    monkeypatch.setattr(threading, "excepthook", said.append)
    assert HeadStart(config)._begun.result(timeout=60) is None
    for thread in threading.enumerate():
        if thread.name == "head start":
            thread.join()
    assert not said


def test_kernels_that_were_not_expected_are_left_to_the_main_thread(folder, config, monkeypatch):
    class Gpu:
        platform = "gpu"

    monkeypatch.setattr(head_start, "expects_accelerator", lambda: False)
    monkeypatch.setattr(jax, "devices", lambda: [Gpu])
    settled = []
    monkeypatch.setattr(head_start, "settle", settled.append)
    assert HeadStart(config)._begun.result() is None and not settled


def test_several_processes_agree_before_anything_begins(config, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_several", lambda: True)
    monkeypatch.setattr(head_start, "HeadStart", None)
    assert begin(config, tmp_path) is None


def test_a_run_folder_that_cannot_be_used_is_refused_before_anything_begins(
        config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(head_start, "HeadStart", None)
    with pytest.raises(ConfigError, match="is a file"):
        begin(config, tmp_path / "file")
