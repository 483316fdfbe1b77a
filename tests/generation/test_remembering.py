"""Generation with a memory: read while it answers, written after each turn, one a user."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conversations import ASK, CHUNK, SETTINGS, STORY, language_model

import hippocampus.files
import hippocampus.sample
from hippocampus.data.batches import Batch
from hippocampus.data.story_rows import StoryStreams
from hippocampus.data.story_tokens import StorySplit
from hippocampus.errors import CheckpointError
from hippocampus.generation import decode
from hippocampus.generation.generate import Row
from hippocampus.generation.memory_file import load_memory
from hippocampus.generation.prompts import converse
from hippocampus.ops.memory_state import join_users

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).resolve().parents[2]


def assert_same(one, other, tolerance=0.0, but=()):
    for name, array in one.arrays().items():
        if name not in but:
            np.testing.assert_allclose(array, getattr(other, name), tolerance, tolerance, name)


def forward(lm, batch, memory):
    """The memory after the model's own forward pass over one row that is a chunk."""
    _, _, state = model_forward(lm.model, lm.params, batch, {"memory": memory})
    return jax.device_get(state["memory"])


@functools.partial(jax.jit, static_argnums=0)
def model_forward(model, params, batch, state):
    return model.apply({"params": params}, batch, state, method="forward")


def by_hand(lm, memory, ids):
    """What chunks, written out here, leave of a memory."""
    for i in range(0, len(ids), CHUNK - 1):
        row = [lm.tokenizer.begin_id, *map(int, ids[i:i + CHUNK - 1])]
        tokens = np.array([[*row, *[7] * (CHUNK - len(row))]], np.int32)
        there = (np.arange(CHUNK) < len(row))[None].astype(np.int32)
        memory = forward(lm, Batch(tokens, tokens, there.astype(np.float32), there,
                                   np.arange(CHUNK, dtype=np.int32)[None], np.zeros(1, bool)),
                         memory)
    return memory


# ---------------------------------------------------------------- what a turn does

@pytest.mark.parametrize("begins", [True, False])
def test_a_text_is_written_as_the_rows_of_a_story_are_in_training(begins):
    lm = language_model(begins=begins)
    ids = lm.tokenizer.encode_document(STORY)
    split = StorySplit(ids, np.array([0, len(ids)]), False, ("tale",), ((),))
    begin = getattr(lm.tokenizer, "begin_id", None)
    rows = StoryStreams(split, ((),), CHUNK, 1, 0, begin, 1.0)
    state = lm.model.init_state(rows.batch(0))["memory"]
    for step in range(rows.windows_per_epoch):
        row = rows.batch(step)
        state = forward(lm, Batch(row.tokens_BT, row.targets_BT, row.loss_weight_BT,
                                  row.document_ids_BT, row.positions_BT, row.reset_B), state)
    memory = lm.open_memory()
    done = lm.remember(STORY, memory=memory)
    assert_same(memory.load(), state, 1e-5, but=("usage_BS",))  # training reads too
    assert (done.tokens, done.chunks) == (len(STORY), -(-len(STORY) // (CHUNK - begins)))
    assert done.writes == 2 * done.chunks and done.used_slots == 8


def test_an_answer_depends_on_prompt_seed_and_memory_alone(lm, told):
    answer = lm.generate(ASK, memory=told, memory_mode="frozen", **SETTINGS)
    assert lm.generate(ASK, memory=told, memory_mode="frozen", **SETTINGS) == answer
    assert lm.generate(ASK, **SETTINGS) != answer
    told.unlink()  # a new memory is that of somebody who has said nothing
    assert lm.generate(ASK, memory=told, **SETTINGS) == lm.generate(ASK, **SETTINGS) != answer


def test_without_a_memory_a_row_begins_with_a_new_users():
    lm = language_model(initial="learned")
    start = decode._empty(lm.model, lm.decode_variables, 2, 16, None)
    fresh = lm.open_memory().load()
    assert fresh.valid_BS.all()
    assert_same(start.cache.memory, join_users([fresh, fresh]))


def test_after_the_answer_prompt_and_answer_are_read_and_written(lm, told):
    before = load_memory(told).state
    found = lm.generate(ASK, memory=told, log_probabilities=True, **SETTINGS)
    said = [*lm.tokenizer.encode(ASK)[1:], *found.tokens]
    after = load_memory(told, lm.fingerprint).state
    assert_same(after, by_hand(lm, before, said), 1e-5)
    assert after.tokens_B - before.tokens_B == len(said) + -(-len(said) // (CHUNK - 1))
    assert lm.generate(ASK, memory=told, memory_mode="frozen", **SETTINGS) != found.text


def test_the_id_that_ends_a_text_is_not_remembered(lm):
    prompt, end = lm.tokenizer.encode("a"), lm.tokenizer.end_ids[0]
    row = Row(prompt, 0, lm.tokenizer, ())
    row.take(np.array([5, 6, end, 7]), np.zeros(4))
    row.finish()
    assert row.continuation.tokens == (5, 6, end) and row.said.tolist() == [*prompt, 5, 6]


def test_read_only_counts_every_token_once_and_changes_nothing_else(lm, told):
    before = load_memory(told).state
    found = lm.generate(ASK, memory=told, memory_mode="read_only", log_probabilities=True,
                        **SETTINGS)
    after = load_memory(told).state
    assert_same(after, before, but=("usage_BS",))
    n = len(ASK) + len(found.tokens)
    read = (after.usage_BS - before.usage_BS).sum()  # padding would add to it
    assert read == pytest.approx(n + -(-n // (CHUNK - 1)), abs=1e-3)


def test_frozen_leaves_every_byte_and_answers_the_same(lm, told):
    whole, before = told.read_bytes(), told.stat()
    frozen = lm.generate(ASK, memory=told, memory_mode="frozen", **SETTINGS)
    assert told.read_bytes() == whole and told.stat().st_mtime_ns == before.st_mtime_ns
    assert lm.generate(ASK, memory=told, memory_mode="read_only", **SETTINGS) == frozen
    assert lm.generate(ASK, memory=told, **SETTINGS) == frozen
    assert told.read_bytes() != whole


@pytest.mark.parametrize("stop", [(), ("stop",)])
def test_a_stream_leaves_the_same_file_and_one_that_is_dropped_the_old_one(
        lm, told, tmp_path, stop):
    whole, other = told.read_bytes(), tmp_path / "other"
    other.write_bytes(whole)
    settings = {**SETTINGS, "stop": stop and lm.generate(
        ASK, memory=told, memory_mode="frozen", **SETTINGS)[5:7]}
    pieces = lm.stream(ASK, memory=told, **settings)
    first = next(pieces)
    pieces.close()
    assert told.read_bytes() == whole
    text = "".join(lm.stream(ASK, memory=told, **settings))
    assert text.startswith(first) and len(text) == (5 if stop else 12)
    assert lm.generate(ASK, memory=other, **settings) == text
    assert other.read_bytes() == told.read_bytes() != whole


def test_a_memory_without_a_file_lives_as_long_as_its_object(lm, told):
    memory = lm.open_memory()
    lm.remember(STORY, memory=memory)
    text = lm.generate(ASK, memory=memory, **SETTINGS)
    assert text == lm.generate(ASK, memory=told, **SETTINGS)
    assert_same(memory.load(), load_memory(told).state)


def test_nothing_to_draw_is_a_turn_too(lm, told):
    before = load_memory(told).state
    assert lm.generate(ASK, memory=told, max_new_tokens=0) == ""
    wanted = by_hand(lm, before, lm.tokenizer.encode(ASK)[1:])
    assert_same(load_memory(told).state, wanted, 1e-5)


def test_a_text_that_fills_no_chunk_scores_as_its_logits_say():
    lm = language_model(chunk=24, context=72)
    text = STORY[:50]
    logits_BTV, _ = lm.run_with_cache(text, ())
    ids = lm.tokenizer.encode(text)
    log_p = jax.nn.log_softmax(logits_BTV)[0, np.arange(len(ids) - 1), ids[1:]]
    found = lm.score(text)
    assert found.tokens == len(ids) - 1
    assert found.nats == pytest.approx(-float(log_p.sum()), rel=1e-4)


def test_a_model_that_says_no_chunk_takes_its_context():
    lm = language_model(chunk=0, context=CHUNK)
    done = lm.remember(STORY, memory=lm.open_memory())
    assert (done.chunks, done.writes) == (-(-len(STORY) // (CHUNK - 1)), 2 * done.chunks)


def test_two_processes_with_the_same_memory_answer_the_same(lm, told, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(told.read_bytes())
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("conversations.py")), str(other), ASK],
        capture_output=True, text=True, timeout=300, env={
            **os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": str(int(
                jax.config.read("jax_disable_most_optimizations")))})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == lm.generate(ASK, memory=told, **SETTINGS)
    assert other.read_bytes() == told.read_bytes()


def test_users_side_by_side_are_as_if_alone(lm, tmp_path):
    prompts = [ASK, "And the rain in all these days?"]
    files = [tmp_path / name for name in ("a", "b")]
    lm.remember([STORY, "The key is in the well."], memory=files)
    before = [path.read_bytes() for path in files]
    together = lm.generate(prompts, memory=files, **SETTINGS)
    after = [load_memory(path).state for path in files]
    for path, old, prompt, text, state in zip(files, before, prompts, together, after, strict=True):
        path.write_bytes(old)
        assert lm.generate(prompt, memory=path, **SETTINGS) == text
        assert_same(load_memory(path).state, state, 1e-5)
    assert lm.generate(prompts[::-1], memory=files, memory_mode="frozen", **SETTINGS) != together
    assert lm.generate([], memory=[]) == []


def test_a_new_memory_replaces_the_old_one_when_it_is_saved(lm, told, tmp_path, monkeypatch):
    whole = told.read_bytes()
    memory = lm.open_memory(told, new=True)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hippocampus.files.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            lm.generate(ASK, memory=memory, **SETTINGS)
    assert told.read_bytes() == whole and sorted(p.name for p in tmp_path.iterdir()) == [told.name]
    text = lm.generate(ASK, memory=memory, **SETTINGS)
    assert text == lm.generate(ASK, **SETTINGS)
    assert lm.generate(ASK, memory=memory, memory_mode="frozen", **SETTINGS) == lm.generate(
        ASK, memory=told, memory_mode="frozen", **SETTINGS) != text
    lm.remember(STORY, memory=tmp_path / "other")
    foreign = language_model(seed=2)  # takes the place of any model's memory, when told to
    foreign.remember(STORY, memory=foreign.open_memory(tmp_path / "other", new=True))
    load_memory(tmp_path / "other", foreign.fingerprint)


def test_what_another_process_saves_during_a_turn_is_kept(lm, told):
    pieces = lm.stream(ASK, memory=told, **SETTINGS)
    next(pieces)
    lm.remember(STORY, memory=told)
    theirs = told.read_bytes()
    with pytest.raises(CheckpointError, match="was changed by another turn"):
        list(pieces)
    assert told.read_bytes() == theirs
    memory = lm.open_memory(told)
    lm.remember(STORY, memory=told)  # between two turns it is no conflict, but what is read
    assert lm.generate(ASK, memory=memory, **SETTINGS)


@pytest.mark.parametrize("kept", [True, False])
def test_of_two_turns_at_once_with_one_object_the_first_that_ends_counts(lm, told, kept):
    memory = lm.open_memory(told if kept else None)
    pieces = lm.stream(ASK, memory=memory, **SETTINGS)
    next(pieces)
    lm.remember(STORY, memory=memory)
    theirs = memory.load()
    memory.load()  # which the turn that began before must not take for its own
    with pytest.raises(CheckpointError, match="was changed by another turn"):
        list(pieces)
    assert_same(memory.load(), theirs)


def test_every_field_of_a_result_is_shown_by_name():
    lm = language_model()
    done = lm.remember("Ann.", memory=lm.open_memory())
    assert dataclasses.asdict(done) == {"tokens": 4, "chunks": 1, "writes": 2, "used_slots": 2}


# ---------------------------------------------------------------- the sample verb

FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]
TYPED = {**SETTINGS, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
         "segments": None, "stop": [], "skip": False, "memory_mode": "read+write"}


@pytest.fixture
def sample(lm, monkeypatch, capsys):
    """Runs the verb with the model; gives what it prints."""
    monkeypatch.setattr("hippocampus.generation.loading.load", lambda *_, **__: lm)

    def run(*flags):
        hippocampus.sample.main(["--workdir=x", *FLAGS, *map(str, flags)])
        return capsys.readouterr().out

    return run


def test_the_verb_remembers_from_one_start_to_the_next(sample, lm, told, tmp_path):
    path, first = tmp_path / "new.memory", lm.generate(ASK, **SETTINGS)
    assert sample(f"--prompt={ASK}", f"--memory={path}", "--no-stream") == f"{ASK}{first}\n"
    other = lm.open_memory()
    lm.generate(ASK, memory=other, **SETTINGS)
    assert_same(load_memory(path).state, other.load())
    line = json.loads(sample(f"--prompt={ASK}", f"--memory={path}", "--log_probabilities"))
    second = line["text"]
    assert second == lm.generate(ASK, memory=other, **SETTINGS) != first
    whole = load_memory(path).state
    third = lm.generate(ASK, memory=other, **SETTINGS)
    assert sample(f"--prompt={ASK}", f"--memory={path}", "--read_only", "--stream") == (
        f"{ASK}{third}\n")
    assert_same(load_memory(path).state, whole, but=("usage_BS",))
    assert sample(f"--prompt={ASK}", f"--memory={path}", "--reset") == f"{ASK}{first}\n"
    assert load_memory(path).state.writes_B < whole.writes_B


def test_the_verb_takes_a_text_in_without_a_word_of_its_own(sample, lm, told, tmp_path,
                                                            monkeypatch):
    path, chunks = tmp_path / "new.memory", -(-len(STORY) // (CHUNK - 1))
    monkeypatch.setattr(sys, "stdin", io.StringIO(STORY))
    assert sample(f"--memory={path}", "--write_only") == (
        f"{path}: {len(STORY)} tokens in {chunks} chunks, 8 of 8 slots in use\n")
    assert path.read_bytes() == told.read_bytes()
    sample(f"--prompt={STORY}", f"--memory={path}", "--write_only")
    assert load_memory(path).state.writes_B == 4 * chunks
    sample(f"--prompt={STORY}", f"--memory={path}", "--write_only", "--reset")
    assert path.read_bytes() == told.read_bytes()


def test_a_conversation_is_saved_after_each_turn(lm, told, monkeypatch, capsys):
    turns, saved = [ASK, "€", "And where?"], []

    def typed(_):
        saved.append(told.read_bytes())
        return turns[len(saved) - 1] if len(saved) <= len(turns) else ""

    monkeypatch.setattr("builtins.input", typed)
    twin = lm.open_memory()
    lm.remember(STORY, memory=twin)
    converse(lm, **TYPED, memory=lm.open_memory(told))
    assert saved[0] != saved[1] == saved[2] != saved[3]
    shown = capsys.readouterr().out
    for prompt in (ASK, "And where?"):
        assert f"{prompt}{lm.generate(prompt, memory=twin, **SETTINGS)}\n" in shown


def test_ctrl_c_in_a_text_leaves_the_memory_of_the_turn_before(lm, told, monkeypatch, capsys):
    whole, lines = told.read_bytes(), iter([ASK, ""])

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(decode, "write", interrupted)
    converse(lm, **TYPED, memory=lm.open_memory(told))
    assert told.read_bytes() == whole
