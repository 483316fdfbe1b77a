"""An exported folder appears whole or not at all, and takes nobody's place."""

import json
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hippocampus.errors import ConfigError, DataError, HippocampusError
from hippocampus.exports.folder import FILES, check_free, is_export, new_export, open_export

WRITE = """
import os, signal, sys
from pathlib import Path
from hippocampus.exports.folder import FILES, new_export

out, after = Path(sys.argv[1]), int(sys.argv[2])
with new_export(out, overwrite=True) as folder:
    for i, name in enumerate(FILES):
        if i == after:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / name).write_text('{"export": {}}')
"""


def fill(folder, text='{"export": {}}'):
    for name in FILES:
        (folder / name).write_text(text)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "an older export there"])
def test_a_killed_export_leaves_what_was_there(tmp_path, after, before):
    out = tmp_path / "out"
    if before:
        with new_export(out, overwrite=False) as folder:
            fill(folder, '{"export": {"old": 1}}')
    done = tiny_run.run([sys.executable, "-c", WRITE, str(out), str(after)])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.exists() == before
    if before:
        assert {p.read_text() for p in out.iterdir()} == {'{"export": {"old": 1}}'}
    with new_export(out, overwrite=True) as folder:  # finds the rest of the killed one
        assert not list(folder.iterdir())
        fill(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert {p.read_text() for p in out.iterdir()} == {'{"export": {}}'}


def test_the_real_command_killed_midway_leaves_nothing_under_the_name(tmp_path):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    command = [sys.executable, "-m", "hippocampus.export", f"--workdir={tiny_run.trained()}",
               f"--out={out}", "--quantize=int8"]
    process = subprocess.Popen(command, env=tiny_run.environment(), stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not (partial / "model.safetensors").exists():
            assert not out.exists()
            time.sleep(0.01)
    finally:
        process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and partial.exists()
    assert not out.exists()


def test_a_failed_export_leaves_nothing_behind(tmp_path):
    with pytest.raises(ZeroDivisionError), new_export(tmp_path / "out", False) as folder:
        fill(folder)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_place_do_not_meet(tmp_path):
    with new_export(tmp_path / "out", False) as folder:
        fill(folder)
        with (pytest.raises(ConfigError, match="another process is exporting"),
              new_export(tmp_path / "out", False)):
            pass
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(FILES)


def test_only_an_export_is_replaced_and_only_when_asked(tmp_path, copy):
    check_free(tmp_path / "new" / "deep", False)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", False)
    with pytest.raises(ConfigError, match="is an export already") as caught:
        check_free(copy, False)
    assert caught.value.hint == "--overwrite replaces it"
    check_free(copy, True)
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt, which no export wrote"):
        check_free(copy, True)
    for other in (tiny_run.trained(), tmp_path):
        with pytest.raises(ConfigError, match="is not empty and not an export"):
            check_free(other, True)
    with pytest.raises(ConfigError, match="is a file"):
        check_free(copy / "notes.txt", True)


@pytest.mark.parametrize("config", ['{"architectures": ["GPT2LMHeadModel"]}', "{", None])
def test_the_model_of_another_tool_is_not_replaced(tmp_path, config):
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text("theirs")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="is not empty and not an export"):
        check_free(tmp_path, True)
    assert is_export(tmp_path)  # so that loading says what is wrong with it
    with pytest.raises(DataError, match=r"config\.json"):
        open_export(tmp_path)


def test_a_run_is_no_export_and_an_export_no_run(exported):
    from hippocampus.config_files import read_json

    assert is_export(exported) and not is_export(tiny_run.trained())
    assert not is_export(exported.parent) and not is_export(exported / "none")
    with pytest.raises(DataError, match="is an exported model, not a run folder"):
        read_json(exported / "config.json")
    with pytest.raises(DataError, match="is not of an exported hippocampus model"):
        open_export(tiny_run.trained())


@pytest.mark.parametrize(("field", "value", "words"), [
    ("format", 2, "format 2; this version reads 1"), ("format", True, "format True"),
    ("step", -1, "export.step is -1"), ("step", "1", "export.step"), ("weights", "best", "weights"),
    ("weights", [], "weights"), ("storage", "int4", "storage"), ("tokenizer", 3, "tokenizer"),
    ("surplus", 3, "has a field 'surplus'")])
def test_a_record_that_is_not_ours_is_a_data_error(copy, field, value, words):
    content = json.loads((copy / "config.json").read_text())
    content["export"][field] = value
    (copy / "config.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=words) as caught:
        open_export(copy)
    assert caught.value.hint


@pytest.mark.parametrize(("text", "words"), [
    ("", "is damaged"), ("[1]", "not a JSON object"), ('{"architectures": []}', "is not of an exp"),
    ('{"export": {}, "format": 9}', "has format 9"), ('{"a":' * 9999, "is damaged"),
    ('{"export": {}, "format": 1, "automatic": 5}', "automatic is not a list"),
    ('{"export": {}, "format": 1, "model": {"d_modle": 3}}', "model.d_modle is not a field"),
    ('{"x": "' + "y" * 2**20 + '"}', "more than 1,048,576 bytes")])
def test_a_config_that_is_not_ours_is_a_data_error(copy, text, words):
    (copy / "config.json").write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        open_export(copy)
    assert caught.value.hint and "\n" not in caught.value.message


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1,
                max_size=3))
@settings(max_examples=100, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bits_of_the_config_are_refused_in_one_line_or_read(copy, exported, flips):
    content = bytearray((exported / "config.json").read_bytes())
    for place, mask in flips:
        content[int(place * len(content))] ^= mask
    (copy / "config.json").write_bytes(content)
    try:
        open_export(copy)
    except HippocampusError as error:
        assert error.exit_code == 66 and "\n" not in error.message
