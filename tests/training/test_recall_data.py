"""A run on a synthetic task: what it reads, what it writes, and that only a memory solves it."""

import json

import jax
import numpy as np
import pytest
import recall_run
from recall_run import config

from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.evaluation.stand_alone import Request, evaluate_run
from hippocampus.generation.loading import load
from hippocampus.models.build_model import build_model
from hippocampus.runs.run_folder import RunFolder, read_metrics
from hippocampus.training.data import read_data, with_steps
from hippocampus.training.loop import fit
from hippocampus.training.recall_data import RecallData


@pytest.fixture(scope="module")
def run():
    return recall_run.trained()


def last(run, name):
    return [row[name] for row in read_metrics(run / "metrics.jsonl") if name in row][-1]


@pytest.mark.full
def test_attention_solves_what_attention_to_one_token_does_not(run, tmp_path):
    blind = fit(config(model__attention__window=1), tmp_path / "blind")
    assert last(run, "eval/accuracy") > 0.99
    assert last(blind, "eval/accuracy") < 0.3  # 14 ids are equally likely


def test_accuracies_of_every_kind_are_logged_and_nothing_per_byte(run):
    rows = read_metrics(run / "metrics.jsonl")
    names = {name for row in rows for name in row}
    assert {"eval/loss", "eval/loss_raw", "eval/accuracy", "eval/accuracy_raw",
            "eval/accuracy_6x1", "eval/accuracy_12x1"} <= names
    assert not any("byte" in name or "word" in name or "24x1" in name for name in names)
    results = json.loads((run / "results.json").read_text())
    assert results["final/accuracy"] > 0.99 and "final/bits_per_byte" not in results


def test_lines_are_those_of_answers(run):
    data = read_data(config())
    lines = data.lines()
    assert isinstance(data, RecallData)
    assert lines["uniform"] == pytest.approx(np.log(16))
    assert lines["unigram"] == pytest.approx(np.log(14), abs=0.02)


def test_another_task_does_not_go_on_with_the_run(run):
    with pytest.raises(ConfigError, match=r"data\.recall\.seed"):
        fit(config(data__recall__seed=1), run)
    data = read_data(config(data__recall__seed=1))
    with pytest.raises(ConfigError, match="another text"):
        data.check_same_as(RunFolder(run))


def test_evaluate_verb_scores_a_split_in_any_context(run):
    report, path = evaluate_run(run, Request(split="test", context=24, weights="ema"))
    written = json.loads(path.read_text())
    assert written["text"]["tokens"] == 3 * 60
    assert set(written["accuracy"]["ema"]) == {"all", "6x1", "12x1", "24x1"}
    assert written["accuracy"]["ema"]["6x1"] > 0.99
    assert all(row["bits_per_byte"] is None for row in written["rows"])
    assert "bits/byte" not in report.table.header


def test_the_model_of_a_run_answers_prompts_of_numbers(run):
    lm = load(run)
    assert [lm.generate(f"{x} 0 0 0 0 1", max_new_tokens=1, temperature=0
                        ).strip() for x in (3, 9, 14)] == ["3", "9", "14"]


def test_an_epoch_is_all_rows():
    found = config(train__epochs=2.0)
    assert with_steps(found, read_data(found)).train.steps == 2 * 1500 // 32 + 1


def test_packed_examples_do_not_see_each_other():
    settings = config(model__paths=("ssm", "hopfield", "attention"))
    data = read_data(settings)
    model = build_model(settings)
    batch = data.batches(settings).batch(0, slice(0, 4))
    params = jax.jit(model.init)(jax.random.key(0), batch.tokens_BT)["params"]
    forward = jax.jit(lambda batch: model.apply({"params": params}, batch, method="forward")[0])
    together = forward(batch)

    def cut(array, part):
        return array[:, part * 6:part * 6 + 6]

    for part in range(2):
        alone = Batch(cut(batch.tokens_BT, part), cut(batch.targets_BT, part),
                      cut(batch.loss_weight_BT, part))
        np.testing.assert_allclose(forward(alone), cut(together, part), atol=2e-5)
