"""A memory as a file: whole or not there, one's own or refused, and what can be read in it."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from memories import FINGERPRINT, S, memory
from safetensors.numpy import load_file, save_file

import hippocampus.files
from hippocampus.data.tokenizers import byte_tokenizer
from hippocampus.errors import CheckpointError, ConfigError
from hippocampus.generation.memory_file import FORMAT, load_memory, save_memory
from hippocampus.generation.memory_slots import export_lines, inspect_memory, merge_memories
from hippocampus.ops.memory_state import take_users

ROOT = Path(__file__).resolve().parents[2]


def assert_same(one, other):
    for name, array in one.arrays().items():
        np.testing.assert_array_equal(array, getattr(other, name), err_msg=name)
        assert array.dtype == getattr(other, name).dtype, name


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ann.memory"
    save_memory(path, memory(users=2), FINGERPRINT, {"user": "Ann é"})
    return path


def test_what_was_saved_is_loaded_bit_for_bit_and_from_device_arrays_too(saved, tmp_path):
    found = load_memory(saved, FINGERPRINT)
    assert_same(found.state, memory(users=2))
    assert found.fingerprint == FINGERPRINT and found.notes == {"user": "Ann é"}
    save_memory(tmp_path / "b", jax.device_put(found.state), FINGERPRINT, found.notes)
    assert (tmp_path / "b").read_bytes() == saved.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"ann.memory", "b"}
    assert set(load_file(saved)) == set(found.state.arrays())  # as any other program reads it


@pytest.mark.parametrize(("field", "value", "words"), [
    ("model", "ee" * 32, "model: model 'abababababab…', here 'eeeeeeeeeeee…'"),
    ("layer", "layers_3", "layer: layer 'memory', here 'layers_3'"),
    ("d_model", 16, "layer: d_model '8', here '16'"),
    ("n_slots", 8, "layer: n_slots '6', here '8'"), ("n_heads", 1, "layer: n_heads '2', here '1'"),
    ("head_width", 8, "layer: head_width '4', here '8'"),
    ("tokenizer", "", "tokenizer: tokenizer 'cdcdcdcdcdcd…', here ''")])
def test_a_memory_of_anything_else_is_refused_by_name(saved, field, value, words):
    with pytest.raises(CheckpointError) as caught:
        load_memory(saved, dataclasses.replace(FINGERPRINT, **{field: value}))
    assert caught.value.message == f"{saved} is the memory of another {words}"


def test_any_flipped_bit_is_found(saved, tmp_path):
    whole, path = saved.read_bytes(), tmp_path / "flipped"
    rng = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*rng.sample(range(header), 150), *rng.sample(range(header, len(whole)), 150)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            load_memory(path, FINGERPRINT)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_file_that_was_cut_is_refused(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        load_memory(saved, FINGERPRINT)
    assert caught.value.hint == "restore it from a copy"


def test_what_is_no_memory_is_refused(tmp_path, saved):
    with pytest.raises(CheckpointError, match="there is no memory at"):
        load_memory(tmp_path / "none")
    weights = tmp_path / "w.safetensors"
    save_file({"a": np.zeros(3)}, weights)
    with pytest.raises(CheckpointError, match="is not a memory"):
        load_memory(weights)
    (tmp_path / "text").write_text("words " * 9)
    with pytest.raises(CheckpointError, match="is damaged: a header of"):
        load_memory(tmp_path / "text")
    newer = saved.read_bytes().replace(FORMAT.encode(), b"hippocampus.memory/2")
    saved.write_bytes(newer)
    with pytest.raises(CheckpointError, match=r"'hippocampus.memory/2', this version reads"):
        load_memory(saved)


def test_a_memory_with_numbers_that_are_not_finite_is_not_saved(saved):
    before = saved.read_bytes()
    bad = memory(users=2)
    bad.values_BSHd[0, 1] = np.nan
    with pytest.raises(CheckpointError, match="values_BSHd has numbers that are not finite"):
        save_memory(saved, bad, FINGERPRINT)
    with pytest.raises(CheckpointError, match=r"keys_BSHd is float32 \[1, 9, 2, 4\], not"):
        save_memory(saved, memory(slots=9), FINGERPRINT)
    assert saved.read_bytes() == before


def test_a_disk_that_refuses_leaves_the_old_file(saved, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    monkeypatch.setattr(hippocampus.files.os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*: No space left on device"):
        save_memory(saved, memory(seed=1), FINGERPRINT)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


def kill_while_saving(path: Path) -> tuple[int, list[Path]]:
    """The number of the last memory that was surely saved, and the half-written files."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("memories.py")), str(path)],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
    try:
        last = int(process.stdout.readline())
        time.sleep(random.uniform(0, 0.1))
        deadline = time.monotonic() + 5
        while not list(path.parent.glob(".m.*.partial")) and time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        last = int((process.communicate()[0].split() or [last])[-1])
    assert process.returncode == -9
    return last, list(path.parent.glob(".m.*.partial"))


def test_killed_in_the_middle_of_saving_the_old_or_the_new_file_is_whole(tmp_path):
    inside = 0
    for _ in range(8):
        last, half = kill_while_saving(tmp_path / "m")
        found = load_memory(tmp_path / "m")
        number = int(found.notes["number"])
        assert number in (last, last + 1)
        assert (found.state.keys_BSHd == number).all() and (found.state.values_BSHd == number).all()
        inside += len(half)
        for left in half:
            left.unlink()
        assert [p.name for p in tmp_path.iterdir()] == ["m"]
        if inside >= 2:
            break
    assert inside >= 2, f"only {inside} kills fell inside a write"


# ---------------------------------------------------------------- what is in it

def test_the_most_used_slots_are_shown_with_the_text_that_wrote_them():
    state = memory(used=4)
    state.usage_BS[0, :4] = [1, 5, 5, 0]
    state.strength_BS[0, 2] = 2
    rows = inspect_memory(state, byte_tokenizer())
    assert [row.slot for row in rows] == [2, 1, 0, 3]
    assert [row.text for row in rows[:3]] == ["e cat", "he ca", "the c"]
    assert (rows[0].usage, rows[0].strength, rows[0].age, rows[0].position) == (5, 2, 3, 2)
    assert [row.slot for row in inspect_memory(state, top=2)] == [2, 1]
    assert inspect_memory(state)[0].ids == tuple(b"e cat") and inspect_memory(state)[0].text is None
    state.source_BSn[0, 2] = [-1, -1, 10**6, 65, 66]  # an id that the tokenizer has not
    assert inspect_memory(state, byte_tokenizer())[0].text == "AB"
    with pytest.raises(ConfigError, match="no user 1"):
        inspect_memory(state, user=1)


def test_export_gives_a_json_object_a_slot():
    lines = [json.loads(line) for line in export_lines(memory(users=2), byte_tokenizer(),
                                                       vectors=True)]
    assert len(lines) == 8 and {line["user"] for line in lines} == {0, 1}
    state = memory(users=2)
    for line in lines:
        here = line["user"], line["slot"]
        assert line["text"].encode() == bytes(list(state.source_BSn[here]))
        np.testing.assert_array_equal(np.float32(line["key"]), state.keys_BSHd[here])
        np.testing.assert_array_equal(np.float32(line["value"]), state.values_BSHd[here])
    assert "key" not in json.loads(next(export_lines(memory())))


def test_merging_keeps_what_was_used_most_of_all():
    one, other = memory(seed=1), memory(seed=2, used=5)
    one.usage_BS[0, :4], other.usage_BS[0, :5] = [9, 1, 8, 2], [7, 0, 3, 6, 0.5]
    merged = merge_memories([one, other])
    assert merged.keys_BSHd.shape == one.keys_BSHd.shape and merged.valid_BS.all()
    assert sorted(merged.usage_BS[0]) == [2, 3, 6, 7, 8, 9]
    assert (np.diff(merged.age_BS[0]) <= 0).all()
    for source, slot in ((one, 0), (one, 2), (other, 3)):
        (place,) = np.flatnonzero(merged.usage_BS[0] == source.usage_BS[0, slot])
        for name in ("keys_BSHd", "values_BSHd", "source_BSn", "position_BS", "age_BS"):
            np.testing.assert_array_equal(getattr(merged, name)[0, place],
                                          getattr(source, name)[0, slot])
    np.testing.assert_array_equal(merged.writes_B, [9])


def test_merging_a_memory_with_itself_or_its_copy_doubles_nothing():
    one = memory(used=4)
    again = merge_memories([one, one])
    np.testing.assert_array_equal(again.valid_BS, one.valid_BS)
    for name in ("keys_BSHd", "usage_BS", "source_BSn", "strength_BS"):
        np.testing.assert_array_equal(getattr(again, name)[0, :4], getattr(one, name)[0, :4])
    assert not again.keys_BSHd[0, 4:].any() and (again.source_BSn[0, 4:] == -1).all()
    later = memory(used=4)
    later.age_BS[0, 0], later.values_BSHd[0, 0], later.usage_BS[0, 0] = 0, 3, 50
    for order in ([one, later], [later, one]):
        merged = merge_memories(order)
        (place,) = np.flatnonzero(merged.usage_BS[0] == 50)
        assert (merged.values_BSHd[0, place] == 3).all() and merged.valid_BS.sum() == 4


def test_merging_never_mixes_users():
    one, other = memory(seed=1, users=2), memory(seed=2, users=2)
    merged = merge_memories([one, other])
    for b in range(2):
        alone = merge_memories([take_users(one, [b]), take_users(other, [b])])
        assert_same(take_users(merged, [b]), alone)
    with pytest.raises(ConfigError, match="merge memories of the same users"):
        merge_memories([one, take_users(other, [0])])
    with pytest.raises(ConfigError, match="no memory"):
        merge_memories([])
    assert merged.valid_BS.shape[1] == S
