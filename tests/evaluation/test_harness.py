"""lm-evaluation-harness: its three questions, and a whole run on local tasks without a network."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import hippocampus.evaluate
import hippocampus.export
import hippocampus.harness
from hippocampus.errors import ConfigError, DataError
from hippocampus.generation.language_model import LanguageModel
from hippocampus.generation.loading import load
from hippocampus.training.loop import fit

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra [eval])")

import lm_eval
from lm_eval.api.instance import Instance

from hippocampus.evaluation.harness import HarnessLM

TASKS = tiny_run.ROOT / "benchmarks/tasks"
PAIRS = [("the cat ", "sat on"), ("the ", "dog"), ("", "a mat"), ("the cat sat on the", " mat"),
         ("the dog ran to a big house and the cat sat on the mat ", "too"),
         ("a", " dog and a cat and a house and a mat")]


@pytest.fixture(scope="module")
def lm():
    return load(tiny_run.trained())


@pytest.fixture(scope="module")
def harness(lm):
    return HarnessLM(lm, batch_size=4)


def ask(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def log_p_by_hand(lm, before, new):
    """Token by token from the public logits, each behind at most `context` ids."""
    total, greedy, ids = 0.0, True, list(before)
    forward = jax.jit(lm.model.apply)
    for target in new:
        seen = np.asarray(ids[-lm.context:])
        padded = np.zeros(lm.context, np.int32)
        padded[:len(seen)] = seen
        logits = forward({"params": lm.params}, jnp.asarray(padded)[None])[0][0, len(seen) - 1]
        total += float(jax.nn.log_softmax(logits)[target])
        greedy &= int(logits.argmax()) == int(target)
        ids.append(target)
    return total, greedy


def test_log_probabilities_are_those_of_the_public_logits(lm, harness):
    encode = lm.tokenizer.encode
    pairs = [pair for pair in PAIRS if len(pair[0]) + len(pair[1]) <= lm.context]
    assert len(pairs) >= 2
    for (context, new), (log_p, greedy) in zip(
            pairs, harness.loglikelihood(ask("loglikelihood", pairs)), strict=True):
        before = encode(context.rstrip()) if context else encode("\n")
        whole = encode(context + new)
        target = whole[len(before):] if context else whole
        wanted = log_p_by_hand(lm, before, target)
        assert log_p == pytest.approx(wanted[0], rel=1e-4) and greedy == wanted[1]


def test_a_context_that_is_too_long_loses_its_beginning(lm, harness):
    encode, new = lm.tokenizer.encode, " too"
    context = "the dog ran to a big house and the cat sat on the mat"
    before, target = encode(context), encode(context + new)[len(encode(context)):]
    assert len(before) > lm.context
    kept = before[len(before) + len(target) - 1 - lm.context:]
    (log_p, greedy), = harness.loglikelihood(ask("loglikelihood", [(context, new)]))
    wanted = log_p_by_hand(lm, kept, target)
    assert log_p == pytest.approx(wanted[0], rel=1e-4) and greedy == wanted[1]


def test_what_greedy_decoding_writes_is_greedy_and_else_it_is_not(lm, harness):
    text = lm.generate("the cat", max_new_tokens=5, temperature=0.0)
    wrong = text[:-1] + ("a" if text[-1] != "a" else "b")
    found = harness.loglikelihood(ask("loglikelihood", [("the cat", text), ("the cat", wrong)]))
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_answers_do_not_depend_on_order_or_batches(lm, harness):
    pairs = PAIRS * 2
    found = harness.loglikelihood(ask("loglikelihood", pairs))
    order = np.random.default_rng(0).permutation(len(pairs))
    mixed = HarnessLM(lm, batch_size=3).loglikelihood(
        ask("loglikelihood", [pairs[i] for i in order]))
    for i, answer in zip(order, mixed, strict=True):
        assert answer[0] == pytest.approx(found[i][0], rel=1e-5) and answer[1] == found[i][1]


def test_a_model_that_knows_nothing_gives_every_id_the_same_share(lm):
    blank = jax.tree.map(lambda leaf: leaf, lm.params)
    name = "embedding" if lm.model.config.tie_embeddings else "head"
    blank = {**blank, name: jnp.zeros_like(blank[name])}
    harness = HarnessLM(LanguageModel(lm.model, blank, lm.tokenizer, lm.config))
    n = len(lm.tokenizer.encode("a mat"))
    (log_p, _), = harness.loglikelihood(ask("loglikelihood", [("the", " a mat")]))
    assert log_p == pytest.approx(-(n + 1) * math.log(lm.model.config.vocab_size), rel=1e-5)
    rolling, = harness.loglikelihood_rolling(ask("loglikelihood_rolling", [("a mat",)]))
    assert rolling == pytest.approx(-n * math.log(lm.model.config.vocab_size), rel=1e-5)


def test_a_rolling_text_costs_what_evaluate_says(lm, harness, tmp_path):
    text = "the cat sat on the mat and the dog ran to a big house " * 6
    (tmp_path / "text.txt").write_text(text)
    hippocampus.evaluate.main([f"--workdir={tiny_run.trained()}", f"--out={tmp_path}",
                               f"--text={tmp_path / 'text.txt'}", "--weights=ema"])
    (report,) = tmp_path.glob("*.json")
    row = next(r for r in json.loads(report.read_text())["rows"] if r["weights"] == "ema")
    rolling, = harness.loglikelihood_rolling(ask("loglikelihood_rolling", [(text,)]))
    # The harness also asks for the first id, which evaluate leaves out.
    (first, _), = harness.loglikelihood(ask("loglikelihood", [("", text[0])]))
    n_bytes = len(text.encode())
    bits = -(rolling - first) / math.log(2) / (n_bytes - len(text[0].encode()))
    assert bits == pytest.approx(row["bits_per_byte"], rel=1e-4)
    assert harness.loglikelihood_rolling(ask("loglikelihood_rolling", [("",)])) == [0.0]


def test_generate_until_is_generate_with_the_tasks_settings(lm, harness):
    plain = lm.generate("the cat", max_new_tokens=12, temperature=0.0)
    stop = plain[3:5]
    requests = ask("generate_until", [
        ("the cat", {"until": [stop], "max_gen_toks": 12}),
        ("the cat", {"until": [], "max_gen_toks": 12}),
        ("the dog", {"until": "\n\n", "max_gen_toks": 6, "do_sample": True, "temperature": 0.7})])
    found = harness.generate_until(requests)
    assert found[0] == plain[:plain.index(stop)] and found[1] == plain
    assert found[2] == lm.generate("the dog", max_new_tokens=6, temperature=0.7, stop="\n\n")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Has 24 positions and no more."""
    return load(fit(tiny_run.config(train__steps=1, model__position="learned", data__context=24,
                                    model__max_length=24, data__tokenizer="bytes"),
                    tmp_path_factory.mktemp("learned") / "run"))


@pytest.mark.full
@pytest.mark.parametrize("prompt", ["the", "the cat sat on the mat and the dog ran", "ü" * 40])
def test_a_task_may_ask_for_more_than_there_are_positions(learned, prompt):
    for asked in (7, 8, 24, 256):
        found, = HarnessLM(learned).generate_until(
            ask("generate_until", [(prompt, {"until": [], "max_gen_toks": asked})]))
        assert found


@pytest.mark.full
@pytest.mark.parametrize(("context", "continuation"), [("the cat", "s"), ("cat", "s")])
def test_what_grows_together_with_its_context_is_not_certain(context, continuation):
    words = load(fit(tiny_run.config(train__steps=1, data__tokenizer="words"),
                     tiny_run.folder() / "words"))
    whole = words.tokenizer.encode(context + continuation)
    assert len(whole) == len(words.tokenizer.encode(context))  # the trap is there
    (log_p, _), nothing = HarnessLM(words).loglikelihood(
        ask("loglikelihood", [(context, continuation), (context, "")]))
    before = whole[:-1] if len(whole) > 1 else words.tokenizer.encode("\n")
    assert log_p == pytest.approx(log_p_by_hand(words, before, whole[-1:])[0], rel=1e-4)
    assert log_p < -0.1 and nothing == (0.0, True)


def test_lm_eval_opens_a_run_by_its_name():
    kind = lm_eval.api.registry.get_model("hippocampus")
    extra = {"batch_size": 2, "max_batch_size": None, "device": None}
    for made in (kind.create_from_arg_string(f"path={tiny_run.trained()},weights=raw", extra),
                 kind.create_from_arg_obj({"path": str(tiny_run.trained()), "weights": "raw"},
                                          extra)):
        assert made.lm.step == load(tiny_run.trained()).step
    with pytest.raises(ConfigError, match="model_args"):
        kind.create_from_arg_obj({"pretrained": "x"})


def test_the_libraries_are_told_to_stay_off_the_network(tmp_path):
    code = (f"import hippocampus.harness as h\n"
            f"try: h.main(['--workdir=none', '--tasks=x', '--include_path={TASKS}'])\n"
            f"except Exception as error: print(error)\n"
            f"import huggingface_hub.constants as c, datasets\n"
            f"print(c.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)")
    found = tiny_run.run([sys.executable, "-c", code])
    assert "no run folder" in found.stdout and found.stdout.endswith("True True\n"), found


def test_results_of_other_weights_or_fewer_questions_have_files_of_their_own(tmp_path):
    for flags in ([], ["--weights=raw"], ["--limit=1"]):
        hippocampus.harness.main([
            f"--workdir={tiny_run.trained()}", "--tasks=hippocampus_paragraphs",
            f"--include_path={TASKS}", f"--out={tmp_path}", *flags])
    paths = list(tmp_path.glob("harness-*.json"))
    assert len(paths) == 3 and all("commit" in json.loads(path.read_text()) for path in paths)


def test_results_name_the_weights_that_were_asked(tmp_path, capsys):
    hippocampus.export.main([f"--workdir={tiny_run.trained()}", f"--out={tmp_path / 'raw'}",
                             "--weights=raw"])
    plain = fit(tiny_run.config(train__steps=1, ema__decay=0.0), tmp_path / "plain")
    for folder in (tmp_path / "raw", plain):
        out = tmp_path / f"of_{folder.name}"
        hippocampus.harness.main([f"--workdir={folder}", "--tasks=hippocampus_paragraphs",
                                  f"--include_path={TASKS}", f"--out={out}", "--limit=1"])
        (path,) = out.glob("harness-*-raw-limit1.json")
        assert json.loads(path.read_text())["weights"] == "raw"
        assert "raw weights" in capsys.readouterr().out


def test_one_space_stands_between_a_question_and_its_answers(lm):
    asked = []

    class Listening(HarnessLM):
        def loglikelihood(self, requests):
            asked.extend(request.args for request in requests)
            return super().loglikelihood(requests)

    lm_eval.simple_evaluate(
        model=Listening(lm), tasks=["hippocampus_questions"], limit=1, bootstrap_iters=0,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(TASKS), include_defaults=False))
    assert asked[0] == ("The opposite of hot is", " cold")


def test_local_tasks_run_without_a_network(tmp_path, capsys):
    hippocampus.harness.main([
        f"--workdir={tiny_run.trained()}", "--tasks=hippocampus_questions,hippocampus_paragraphs",
        f"--include_path={TASKS}", f"--out={tmp_path}", "--limit=3"])
    (path,) = tmp_path.glob("harness-*.json")
    results = json.loads(path.read_text())["results"]
    assert 0 <= results["hippocampus_questions"]["acc,none"] <= 1
    assert results["hippocampus_paragraphs"]["bits_per_byte,none"] > 0.5
    out = capsys.readouterr().out
    assert "hippocampus_paragraphs" in out and str(path) in out


@pytest.mark.parametrize(("flags", "error", "message"), [
    (["--tasks=nothing", f"--include_path={TASKS}"], ConfigError, "there is no task 'nothing'"),
    (["--tasks=x", "--include_path=/nowhere"], DataError, "there is no folder"),
    (["--tasks=x", "--limit=0"], ConfigError, "--limit is 0")])
def test_what_cannot_run_is_refused_in_one_line(flags, error, message, tmp_path):
    with pytest.raises(error, match=message):
        hippocampus.harness.main([f"--workdir={tiny_run.trained()}", f"--out={tmp_path}", *flags])
