"""The facade that users hold: load, generate, score, look inside."""

import dataclasses
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
from hippocampus.data.tokenizer_files import bpe_trainer, library_bpe
from hippocampus.data.tokenizers import Tokenizer, byte_tokenizer, character_tokenizer
from hippocampus.errors import CheckpointError, ConfigError, DataError
from hippocampus.generation import decode, generate, language_model
from hippocampus.generation.generate import Continuation
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.models.build_model import build_model
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.training.report import generate_sample

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
    settings = {"max_new_tokens": 30, "seed": 1, "temperature": 3.0}
    pieces = lm.stream("the ", **settings)
    assert isinstance(pieces, types.GeneratorType)
    pieces = list(pieces)
    assert len(pieces) > 3 and all(pieces)
    assert "".join(pieces) == lm.generate("the ", **settings)
    assert list(lm.generate("the ", stream=True, **settings)) == pieces


def test_a_list_of_prompts_gives_what_each_gives_alone(lm):
    prompts = ["the cat ", "a", TEXT, "the cat "]
    alone = [lm.generate(prompt, max_new_tokens=12, seed=5) for prompt in prompts]
    assert lm.generate(prompts, max_new_tokens=12, seed=5) == alone
    assert alone[0] == alone[3] and len(set(alone)) > 1
    assert lm.generate(("a",), max_new_tokens=12, seed=5) == alone[1:2]
    assert lm.generate([]) == lm.generate([], log_probabilities=True) == []


def test_every_prompt_can_have_a_seed_of_its_own(lm):
    seeds = [3, 0, 2**32 - 1, 3]
    together = lm.generate(["the "] * 4, max_new_tokens=12, seed=seeds)
    assert together == [lm.generate("the ", max_new_tokens=12, seed=seed) for seed in seeds]
    assert len(set(together)) == 3
    assert lm.generate(["the "] * 4, max_new_tokens=12, seed=np.asarray(seeds)) == together


def test_more_prompts_than_a_batch_come_back_in_their_order(lm, monkeypatch):
    prompts = [TEXT[:n] for n in (9, 1, 30, 4)]
    whole = lm.generate(prompts, max_new_tokens=8, temperature=0.0)
    monkeypatch.setattr(generate, "ROWS_PER_BATCH", 1)
    assert lm.generate(prompts, max_new_tokens=8, temperature=0.0) == whole


def test_a_smaller_cache_holds_all_that_a_row_will_have(lm, monkeypatch):
    settings = {"max_new_tokens": 8, "temperature": 0.0, "log_probabilities": True}
    whole = lm.generate("th", **settings)
    monkeypatch.setattr(decode, "_SMALLEST_CACHE", 2)
    found = lm.generate("th", **settings)
    assert found.tokens == whole.tokens
    assert found.log_probabilities == pytest.approx(whole.log_probabilities, rel=1e-5)


def test_log_probabilities_are_those_of_the_model(lm):
    found = lm.generate("the ", max_new_tokens=8, temperature=0.7, top_k=9, seed=4,
                        log_probabilities=True)
    assert found.text == lm.generate("the ", max_new_tokens=8, temperature=0.7, top_k=9, seed=4)
    assert lm.tokenizer.decode(found.tokens) == found.text
    ids = np.asarray([*lm.tokenizer.encode("the "), *found.tokens])
    logits, _ = lm.run_with_cache(ids[None, :12])
    log_p = jax.nn.log_softmax(logits[0])
    wanted = [float(log_p[3 + n, token]) for n, token in enumerate(found.tokens)]
    assert found.log_probabilities == pytest.approx(wanted, abs=1e-4)


def test_text_longer_than_the_context_can_be_continued(lm):
    assert len(lm.generate(TEXT * 3, max_new_tokens=20, temperature=0.0)) > 0


def test_nothing_is_written_when_nothing_is_asked_for(lm):
    assert lm.generate("the ", max_new_tokens=0) == "" and list(
        lm.stream("the ", max_new_tokens=0)) == []
    nothing = Continuation("", (), (), "length")
    assert lm.generate(["a", "b"], max_new_tokens=0, log_probabilities=True) == [nothing] * 2


@pytest.mark.parametrize("settings", [
    {"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1},
    {"top_k": 1.5}, {"top_k": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan},
    {"min_p": -0.1}, {"min_p": 1.1}, {"min_p": math.nan}, {"repetition_penalty": 0.0},
    {"repetition_penalty": math.nan}, {"repetition_penalty": math.inf}, {"max_new_tokens": -1},
    {"max_new_tokens": math.nan}, {"max_new_tokens": 2.5}, {"seed": -1}, {"seed": 2**32},
    {"seed": math.nan}, {"seed": [2**32]}, {"stop": ""}, {"stop": ["a", ""]}, {"segments": 0},
    {"segments": math.nan}])
def test_setting_out_of_range_is_refused_by_name(lm, settings):
    (name,) = settings
    for call in (lm.generate, lm.stream):
        with pytest.raises(ConfigError, match=f"^{name} is ") as caught:
            call("the", **settings)
        assert caught.value.hint.startswith("it must be ")


@pytest.mark.parametrize(("prompt", "settings", "message"), [
    ("", {}, "the prompt is empty"),
    (["a", "", "b"], {}, "prompt 2 of 3 is empty"),
    (["a", 3], {}, "prompt 2 of 2 is 3"),
    (["a", "b"], {"seed": [1, 2, 3]}, "seed has 3 values for 2 prompts"),
    (["a"], {"stream": True}, "stream gives the text of one prompt"),
    ("a", {"stream": True, "log_probabilities": True}, "stream gives the text of one prompt"),
    ("a", {"segments": 2}, "segments is 2, and the model was trained with one pass"),
    ("a", {"skip": True}, "skip needs a segment flow")])
def test_what_cannot_be_done_is_refused_in_one_line(lm, prompt, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        lm.generate(prompt, **settings)
    assert caught.value.hint and "\n" not in str(caught.value)


# ---------------------------------------------------------------- other models

@pytest.fixture(scope="module")
def other(random_parameters):
    """Overrides, and a tokenizer -> a lively model that was never trained."""
    def make(tokenizer, **changes):
        config = tiny_run.config(model__vocab_size=tokenizer.vocab_size, **changes)
        model = build_model(config)
        return LanguageModel(model, random_parameters(model), tokenizer, config)

    return make


@pytest.fixture(scope="module")
def readable(other):
    """One that writes characters, so that every piece of its text can be a stop string."""
    return other(character_tokenizer(TEXT), model__tie_embeddings=False)


@pytest.mark.parametrize("length", [1, 5, 8])
def test_text_ends_in_front_of_a_stop_string(readable, length):
    lm = readable
    settings = {"max_new_tokens": 30, "seed": 1, "log_probabilities": True}
    whole = lm.generate("the ", **settings)
    stop = whole.text[11:11 + length]
    found = lm.generate("the ", stop=stop, **settings)
    at = whole.text.index(stop)
    assert found.text == whole.text[:at] and found.finish == "stop" and whole.finish == "length"
    assert whole.tokens[:len(found.tokens)] == found.tokens
    n = len(found.tokens)
    written = lm.tokenizer.decode(found.tokens)
    assert stop in written and stop not in lm.tokenizer.decode(found.tokens[:-1])
    assert found.log_probabilities == pytest.approx(whole.log_probabilities[:n], rel=1e-5)
    pieces = list(lm.stream("the ", stop=("not there", stop), max_new_tokens=30, seed=1))
    assert "".join(pieces) == found.text


def test_of_several_prompts_each_stops_alone(readable):
    lm = readable
    prompts, settings = ["the ", "a cat", "mat"], {"max_new_tokens": 40, "seed": 2}
    whole = lm.generate(prompts, **settings)
    stop = whole[0][3:5]
    found = lm.generate(prompts, stop=[stop], log_probabilities=True, **settings)
    for text, continuation in zip(whole, found, strict=True):
        assert continuation.text == text.split(stop)[0]
        assert continuation.finish == ("stop" if stop in text else "length")
    assert found[0].finish == "stop"


@pytest.fixture(scope="module")
def bpe():
    library = library_bpe()
    library.train_from_iterator([f"{TEXT}, it's 12 éé\n"] * 9, bpe_trainer(300, False))
    return Tokenizer(library.to_str())


def test_the_id_that_ends_a_text_ends_it_and_is_not_part_of_it(other, bpe):
    lm = other(bpe)
    # The end follows everything, after a few tokens that the draws leave to chance.
    lm.params["norm_out"]["scale"] *= 0.6
    settings = {"max_new_tokens": 300, "log_probabilities": True}
    found = lm.generate(["the cat", "a", "dog ran"], seed=[1, 2, 3], **settings)
    ended = [c for c in found if c.finish == "stop"]
    assert ended and all(c.tokens[-1] == bpe.end_id for c in ended)
    for continuation in found:
        assert "<|endoftext|>" not in continuation.text
        assert bpe.end_id not in continuation.tokens[:-1]
        kept = continuation.tokens[:-1 if continuation.finish == "stop" else None]
        assert continuation.text == bpe.decode(kept)
        assert len(continuation.tokens) == len(continuation.log_probabilities)
    pieces = list(lm.stream("the cat", seed=1, max_new_tokens=300))
    assert "".join(pieces) == found[0].text


def test_more_tokens_than_learned_positions_are_refused(other):
    lm = other(byte_tokenizer(), model__position="learned")
    assert lm.room("the ") == 12 and len(lm.generate(
        "the ", max_new_tokens=12, log_probabilities=True).tokens) == 12
    for prompt in ("the ", ["a", "the "]):
        with pytest.raises(ConfigError, match="of 4 tokens and max_new_tokens of 13 are more than "
                                              "the model's 16 learned positions"):
            lm.generate(prompt, max_new_tokens=13)


@pytest.mark.parametrize(("prompt", "length"), [("the ", 12), ("the " * 4, 0), ("the " * 9, 0)])
def test_a_sample_in_training_is_no_longer_than_learned_positions(other, prompt, length):
    lm = other(byte_tokenizer(), model__position="learned", sample__max_new_tokens=50,
               sample__prompt=prompt)
    lm.params["norm_out"]["scale"] *= 0  # all tokens are as likely, and the first one is taken
    config = dataclasses.replace(lm.config, sample=dataclasses.replace(
        lm.config.sample, temperature=0.0))
    assert generate_sample(lm, config) == "\0" * length


def test_passes_can_be_chosen_and_skipped(other):
    lm = other(byte_tokenizer(), model__segments__train=2, model__segments__feedback=True,
               loss__rectified_flow__segment_weight=0.1)
    found = {name: lm.generate("the cat", max_new_tokens=9, temperature=0.0,
                               log_probabilities=True, **settings)
             for name, settings in {"trained": {}, "1": {"segments": 1}, "2": {"segments": 2},
                                    "skip": {"skip": True}}.items()}
    assert found["trained"] == found["2"]
    _, out = lm.run_with_cache("the cat", "*")
    head = lm.model.head(lm.params)
    for name, hidden in (("1", out["segments.hidden"][0]), ("2", out["segments.hidden"][1]),
                         ("skip", out["flow.skip_hidden"])):
        log_p = jax.nn.log_softmax(head.logits(hidden)[0, -1])
        assert found[name].tokens[0] == int(jnp.argmax(log_p))
        assert found[name].log_probabilities[0] == pytest.approx(float(log_p.max()), rel=1e-4)
    assert len({c.log_probabilities for c in found.values()}) == 3
    with pytest.raises(ConfigError, match="skip runs one pass, and segments is 2"):
        lm.generate("a", skip=True, segments=2)


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


def test_a_list_of_texts_gives_a_score_for_each(lm):
    texts = [TEXT, "a cat", TEXT[:17]]
    assert lm.score(texts) == [lm.score(text) for text in texts] and lm.score([]) == []


def test_texts_of_all_lengths_compile_few_programs(lm):
    before = language_model._nll_sum._cache_size()
    lm.score([TEXT[:n] for n in range(2, len(TEXT))])
    assert language_model._nll_sum._cache_size() - before <= 1


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


def test_a_list_of_texts_gives_a_list_of_intermediates(lm):
    texts, names = [TEXT[:10], TEXT[:7]], "layers.0.mixer.gates"
    edit = {"layers.0.hopfield.out": jnp.zeros_like}
    for several, one in (
            (lm.run_with_cache(texts, names), [lm.run_with_cache(t, names) for t in texts]),
            (lm.run_with_edits(texts, edit), [lm.run_with_edits(t, edit) for t in texts])):
        assert [found[0].shape[1] for found in several] == [10, 7]
        for found, wanted in zip(several, one, strict=True):
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


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
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load(run)


def test_damaged_best_step_is_stepped_over_with_a_line(tmp_path, folder, lm):
    run = without(folder, tmp_path)
    best = lm.step - 1  # of two that are as good, the earlier one
    shutil.copytree(run / "steps" / str(lm.step), run / "steps" / str(best))
    before = sorted(run.rglob("*"))
    assert load(run).step == best
    data = next(iter(sorted((run / "steps" / str(best) / "ema" / "d").iterdir())))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    for weights in ("ema", "raw"):  # evaluate compares the two of one step
        with pytest.warns(UserWarning, match=rf"checkpoint {best} is damaged \(ema/d/.*; using"):
            assert load(run, weights=weights).step == lm.step
    with pytest.raises(CheckpointError, match=f"checkpoint {best} is damaged"):
        load(run, step=best)
    assert sorted(run.rglob("*")) == before


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
