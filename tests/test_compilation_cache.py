"""Compiled programs are kept for the user alone, and found by the next process."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from hippocampus.compilation_cache import FOLDER, use_compilation_cache

PROGRAM = """import jax
from hippocampus.compilation_cache import use_compilation_cache
print(use_compilation_cache())
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.monitoring.register_event_listener(lambda event, **_: print(event))
jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).block_until_ready()
"""


@pytest.fixture
def unset(monkeypatch):
    """JAX as it was before, whatever a test has set."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
             "jax_compilation_cache_max_size")
    before = {name: getattr(jax.config, name) for name in names}
    yield monkeypatch
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", FOLDER: str(tmp_path / "kept")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    outputs = [subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True,
                              capture_output=True, text=True).stdout for _ in range(2)]
    folder = Path(outputs[0].splitlines()[0])
    assert folder.parent == tmp_path / "kept" and list(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    hit = "/jax/compilation_cache/cache_hits"
    assert hit not in outputs[0] and hit in outputs[1]


def test_what_a_killed_process_left_half_written_is_removed(unset, tmp_path):
    unset.setenv(FOLDER, str(tmp_path / "kept"))
    folder = use_compilation_cache()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"x")
    jax.config.update("jax_compilation_cache_dir", None)
    assert use_compilation_cache() == folder
    assert sorted(path.name for path in folder.iterdir()) == ["whole-atime", "whole-cache"]


def test_it_is_off_where_asked_and_never_takes_anothers_place(unset, tmp_path):
    unset.setenv(FOLDER, "off")
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None
    unset.setenv(FOLDER, str(tmp_path / "ours"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "theirs")
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_others_can_write_is_not_used(unset, tmp_path):
    unset.setenv(FOLDER, str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write there"):
        assert use_compilation_cache() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_a_folder_that_cannot_be_made_is_a_warning(unset, tmp_path):
    (tmp_path / "file").write_text("")
    unset.setenv(FOLDER, str(tmp_path / "file" / "kept"))
    with pytest.warns(UserWarning, match="not kept"):
        assert use_compilation_cache() is None
