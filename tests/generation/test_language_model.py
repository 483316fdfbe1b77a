"""The facade that users hold: load, generate, score, look inside."""

import json
import math
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import hippocampus.sample
from hippocampus.data.tokenizers import character_tokenizer
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.generation.loading import load
from hippocampus.runs.checkpoints import Checkpoints

TEXT = "the cat sat on the mat and the dog ran to a big house"


@pytest.fixture(scope="module")
def folder():
    return tiny_run.trained()


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


# ---------------------------------------------------------------- generate

def test_generation_is_a_function_of_the_seed(lm):
    first = lm.generate("the ", max_new_tokens=20, seed=3)
    assert lm.generate("the ", max_new_tokens=20, seed=3) == first
    assert len({lm.generate("the ", max_new_tokens=20, seed=seed) for seed in range(4)}) == 4


def test_streamed_pieces_are_the_whole_text(lm):
    pieces = lm.generate("the ", max_new_tokens=30, seed=1, temperature=3.0, stream=True)
    assert isinstance(pieces, types.GeneratorType)
    pieces = list(pieces)
    assert len(pieces) > 3
    assert "".join(pieces) == lm.generate("the ", max_new_tokens=30, seed=1, temperature=3.0)


def test_text_longer_than_the_context_can_be_continued(lm):
    assert len(lm.generate(TEXT * 3, max_new_tokens=20, temperature=0.0)) > 0
    assert lm.generate("the ", max_new_tokens=0) == ""


@pytest.mark.parametrize("settings", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
    {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}, {"max_new_tokens": -1}, {"seed": -1},
    {"seed": 2**32}])
def test_setting_out_of_range_is_refused_by_name(lm, settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
        lm.generate("the", **settings)
    assert caught.value.hint.startswith("it must be ")


def test_empty_prompt_is_refused(lm):
    with pytest.raises(ConfigError, match="the prompt is empty"):
        lm.generate("")


# ---------------------------------------------------------------- score

def by_hand(lm, text: str) -> float:
    """Summed -log p, window by window, from the public logits."""
    ids, context = lm.tokenizer.encode(text), lm.config.data.context
    forward, nats = jax.jit(lm.model.apply), 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start:start + context + 1]
        padded = np.zeros(context, np.int32)
        padded[:len(window) - 1] = window[:-1]
        logits, _ = forward({"params": lm.params}, jnp.asarray(padded)[None])
        log_p = jax.nn.log_softmax(logits[0].astype(jnp.float32))
        nats -= sum(float(log_p[t, target]) for t, target in enumerate(window[1:]))
    return nats


@pytest.mark.parametrize("text", [TEXT[:9], TEXT, TEXT[:17]], ids=len)
def test_score_is_the_summed_loss_of_all_tokens_but_the_first(lm, text):
    score = lm.score(text)
    assert score.nats == pytest.approx(by_hand(lm, text), rel=1e-4)
    assert score.tokens == score.bytes == len(text) - 1
    assert score.words == len(text.split())
    assert score.bits_per_byte == pytest.approx(score.nats / math.log(2) / (len(text) - 1))
    assert score.nats_per_token == pytest.approx(score.nats / (len(text) - 1))
    assert score.word_ppl == pytest.approx(math.exp(score.nats / len(text.split())))


def test_bytes_are_those_of_what_was_predicted(lm):
    score = lm.score("é the")
    assert score.tokens == score.bytes == len("é the".encode()) - 1
    assert score.words == 2


@pytest.mark.parametrize("text", ["", "x"])
def test_nothing_to_predict_is_refused(lm, text):
    with pytest.raises(DataError, match="shorter than two tokens"):
        lm.score(text)


# ---------------------------------------------------------------- look inside

def test_intermediates_come_by_name(lm):
    logits, cache = lm.run_with_cache(TEXT[:10], names="layers.*.mixer.gates")
    assert logits.shape == (1, 10, lm.tokenizer.vocab_size)
    assert set(cache) == {"layers.0.mixer.gates"}
    np.testing.assert_allclose(cache["layers.0.mixer.gates"].sum(-1), 1, rtol=1e-5)


def test_an_edit_changes_what_follows_and_none_changes_nothing(lm):
    plain, _ = lm.run_with_cache(TEXT[:10], names="layers.0.residual")
    same, _ = lm.run_with_edits(TEXT[:10], {})
    other, _ = lm.run_with_edits(TEXT[:10], {"layers.0.hopfield.out": jnp.zeros_like})
    np.testing.assert_array_equal(plain, same)
    assert jnp.abs(plain - other).max() > 1e-4


@pytest.mark.parametrize("tokens", ["", jnp.zeros((3,), jnp.int32), jnp.zeros((1, 0), jnp.int32)])
def test_tokens_of_another_shape_are_refused(lm, tokens):
    with pytest.raises(ConfigError, match="tokens have the shape"):
        lm.run_with_cache(tokens)


# ---------------------------------------------------------------- load

def test_best_step_and_averaged_weights_are_the_default(folder, lm):
    with Checkpoints(folder / "steps") as checkpoints:
        assert lm.step == checkpoints.best
    assert tiny_run.digest(load(folder, weights="ema").params) == tiny_run.digest(lm.params)
    raw = load(str(folder), weights="raw")
    assert raw.step == lm.step and tiny_run.digest(raw.params) != tiny_run.digest(lm.params)


def test_best_step_scores_the_validation_text_as_training_said(folder, lm):
    from hippocampus.data.evaluation_windows import EvaluationWindows
    from hippocampus.evaluation.evaluate import evaluate

    text = tiny_run.corpus().read_text()
    ids = lm.tokenizer.encode(text[len(text) * 9 // 10:])
    found = evaluate(lm.model, lm.params, EvaluationWindows(ids, 16, 8), 1.0)
    results = json.loads((folder / "results.json").read_text())
    assert found.nats_per_token == pytest.approx(results["final/loss"], rel=1e-5)


def test_a_saved_step_can_be_chosen(tmp_path, folder):
    with Checkpoints(folder / "steps") as checkpoints:
        steps = checkpoints.steps
    for step in steps:
        assert load(folder, step=step).step == step


def test_step_that_was_not_saved_is_refused_naming_those_that_were(folder):
    with pytest.raises(CheckpointError, match="has no step 3") as caught:
        load(folder, step=3)
    assert caught.value.hint.startswith("saved: ") and "12" in caught.value.hint


def test_unknown_weights_are_refused(folder):
    with pytest.raises(ConfigError, match="weights is 'best'"):
        load(folder, weights="best")


def test_missing_folder_is_a_data_error(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match="no run folder at"):
            load(path)
    assert not list(tmp_path.iterdir())


def without(folder, tmp_path, *names):
    shutil.copytree(folder, tmp_path / "run")
    for name in names:
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return tmp_path / "run"


def test_run_without_checkpoints_is_a_checkpoint_error(tmp_path, folder):
    run = without(folder, tmp_path, "steps")
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load(run)
    (run / "steps").mkdir()
    with pytest.raises(CheckpointError, match="has no step None"):
        load(run)


def test_run_without_a_tokenizer_is_a_data_error(tmp_path, folder):
    with pytest.raises(DataError, match="there is no tokenizer"):
        load(without(folder, tmp_path, "tokenizer.json"))


def test_run_without_an_average_has_raw_weights_only(tmp_path, folder):
    run = without(folder, tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["ema"]["decay"] = 0.0
    (run / "config.json").write_text(json.dumps(config))
    assert tiny_run.digest(load(run).params) == tiny_run.digest(load(folder, weights="raw").params)


def test_weights_of_another_model_are_a_checkpoint_error(tmp_path, folder):
    run = without(folder, tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["model"]["d_model"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="could not be restored"):
        load(run)


# ---------------------------------------------------------------- the verb

def test_sample_verb_prints_the_prompt_and_its_continuation(capsys, folder, lm):
    hippocampus.sample.main([f"--workdir={folder}", "--prompt=the ", "--max_new_tokens=12",
                             "--temperature=0.5", "--top_k=9", "--seed=4"])
    wanted = lm.generate("the ", max_new_tokens=12, temperature=0.5, top_k=9, seed=4)
    assert capsys.readouterr().out == f"the {wanted}\n"


def test_a_tokenizer_of_another_run_is_refused_by_its_hash(tmp_path):
    run = shutil.copytree(tiny_run.trained(), tmp_path / "run")
    character_tokenizer("abc").save(run / "tokenizer.json")
    with pytest.raises(DataError, match="is not the tokenizer that the run was trained with"):
        load(run)
