"""Whose a memory is: one user's, of one model; what else is given is refused and stays as it is."""

import fcntl
import os
import threading

import jax
import numpy as np
import pytest
from conversations import ASK, FIXTURE, STORY, language_model

from hippocampus.backbones.loading import load_backbone
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.memory_file import load_memory, save_memory
from hippocampus.ops.memory_state import join_users

pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_one_memory_is_never_two_users(lm, told, tmp_path):
    whole = told.read_bytes()
    (tmp_path / "link").symlink_to(told)
    (tmp_path / "hard").hardlink_to(told)
    mine = lm.open_memory()
    for pair in ([told, told], [str(told), tmp_path / "link"], [told, tmp_path / "hard"],
                 [mine, mine], [tmp_path / "new", tmp_path / "x" / ".." / "new"]):
        with pytest.raises(ConfigError, match="is given twice, as memory 1 and memory 2"):
            lm.generate([ASK, ASK], memory=pair)
    for bad in (told, [told], mine):
        with pytest.raises(ConfigError, match="memories for another number of users"):
            lm.generate([ASK, ASK], memory=bad)
    with pytest.raises(ConfigError, match="it must be a file"):
        lm.generate(ASK, memory=[told])
    two = join_users([load_memory(told).state] * 2)
    save_memory(tmp_path / "two", two, lm.fingerprint)
    with pytest.raises(CheckpointError, match="holds the memories of 2 users"):
        lm.generate(ASK, memory=tmp_path / "two")
    assert told.read_bytes() == whole


def test_a_link_stays_a_link(lm, told, tmp_path):
    (tmp_path / "link").symlink_to(told)
    whole = told.read_bytes()
    lm.remember(ASK, memory=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and told.read_bytes() != whole


@pytest.mark.parametrize(("changes", "words"), [
    ({"seed": 2}, "memory of another model: model"),
    ({"begins": False}, "memory of another tokenizer: tokenizer"),
    ({"n_slots": 9}, "memory of another layer: n_slots '8', here '9'"),
    ({"source_tokens": 4}, "has source_tokens 3, here 4")])
def test_a_foreign_memory_is_refused_and_stays(lm, told, changes, words):
    whole, other = told.read_bytes(), language_model(**changes)
    for ask in (lambda: other.generate(ASK, memory=told), lambda: other.stream(ASK, memory=told),
                lambda: other.remember(STORY, memory=told)):
        with pytest.raises(CheckpointError, match=words):
            ask()
    if "source_tokens" not in changes:
        with pytest.raises(ConfigError, match="opened by another model"):
            other.generate(ASK, memory=lm.open_memory(told))
    assert told.read_bytes() == whole


def test_the_fingerprint_is_of_every_parameter(lm):
    def of(params):
        return LanguageModel(lm.model, params, lm.tokenizer, lm.config).fingerprint

    again = jax.tree.map(np.array, lm.params)
    assert of(again) == lm.fingerprint and lm.fingerprint.layer == "memory_bank"
    for path, _ in jax.tree_util.tree_leaves_with_path(again):
        def flip(where, leaf, path=path):
            changed = np.array(leaf)
            if where == path:
                changed.reshape(-1).view(np.uint8)[0] ^= 1
            return changed

        assert of(jax.tree_util.tree_map_with_path(flip, again)).model != lm.fingerprint.model


def test_a_damaged_memory_is_refused_and_stays(lm, told):
    whole = bytearray(told.read_bytes())
    whole[-5] ^= 4
    told.write_bytes(whole)
    for ask in (lambda: lm.generate(ASK, memory=told), lambda: lm.remember(ASK, memory=told),
                lambda: lm.open_memory(told, new=True)):
        with pytest.raises(CheckpointError, match="is damaged"):
            ask()
    assert told.read_bytes() == whole


def test_who_may_read_a_memory_stays_as_it_is(lm, told):
    told.chmod(0o600)
    lm.remember(STORY, memory=told)
    assert told.stat().st_mode & 0o777 == 0o600


def test_bad_requests_are_refused_and_nothing_is_written(lm, told, tmp_path):
    whole, missing = told.read_bytes(), tmp_path / "none"
    cases = (
        (lambda: lm.generate(ASK, memory=missing, memory_mode="read_only"), CheckpointError,
         "there is no memory at"),
        (lambda: lm.generate(ASK, memory=told, memory_mode="write_only"), ConfigError,
         "memory_mode is 'write_only'"),
        (lambda: lm.generate(ASK, memory_mode="frozen"), ConfigError, "with a memory"),
        (lambda: lm.generate(ASK, memory=3), ConfigError, "memory is 3"),
        (lambda: lm.generate("", memory=told, temperature=-1.0), ConfigError, "temperature is -1"),
        (lambda: lm.generate("€", memory=missing), DataError, "cannot read the text"),
        (lambda: lm.remember("", memory=missing), ConfigError, "the text is empty"),
        (lambda: lm.remember(["a", ""], memory=[missing, told]), ConfigError, "text 2 of 2 is"),
        (lambda: lm.remember("a", memory=None), ConfigError, "memory is None"),
        (lambda: lm.remember("a", memory=tmp_path), CheckpointError, "there is no memory at"),
        (lambda: lm.remember("a", memory=told / "x"), CheckpointError, "cannot read"),
        (lambda: lm.remember("a", memory="x" * 300), ConfigError, "cannot be a path"))
    for ask, error, words in cases:
        with pytest.raises(error, match=words) as caught:
            ask()
        assert "\n" not in caught.value.message and caught.value.hint
    assert told.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == [told.name]


def test_a_place_that_takes_no_file_is_found_before_the_turn(lm, told, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    with pytest.raises(ConfigError, match="cannot write to") as caught:
        lm.stream(ASK, memory=told)
    assert caught.value.hint == "choose another place for the memory"
    lm.stream(ASK, memory=told, memory_mode="frozen")


def test_saves_wait_for_each_other_and_the_second_finds_the_first(lm, told):
    memory, failed = lm.open_memory(told), []
    version = memory.version()

    def save():
        try:
            memory.save(memory.load(), version)
        except CheckpointError as error:
            failed.append(error.message)

    folder = os.open(told.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)  # as another process does while it saves
    thread = threading.Thread(target=save)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    os.utime(told, ns=(1, 1))
    os.close(folder)
    thread.join(20)
    assert len(failed) == 1 and "was changed by another turn" in failed[0]


def test_a_model_without_a_memory_says_so(lm, told):
    decoder = load_backbone(FIXTURE)
    plain = LanguageModel(decoder.model, decoder.params, lm.tokenizer, lm.config)
    for ask in (lambda: plain.generate(ASK, memory=told), lambda: plain.open_memory(told),
                lambda: plain.generate(ASK, memory=lm.open_memory()),
                lambda: plain.remember(ASK, memory=told)):
        with pytest.raises(ConfigError, match=r"^the model has no memory"):
            ask()
