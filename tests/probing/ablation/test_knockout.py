"""Knock-outs of a real trained model, against the model evaluated by hand."""

import shutil

import jax
import jax.numpy as jnp
import pytest
import tiny_run

import hippocampus
from hippocampus.config_files import defaults
from hippocampus.evaluation.stand_alone import Request, evaluate_run
from hippocampus.models.interventions import Interventions
from hippocampus.ops.cross_entropy import token_nll
from hippocampus.probing.ablation.grid import make_grid
from hippocampus.probing.ablation.knockout import losses, measure
from hippocampus.probing.ablation.study import Study
from hippocampus.probing.probe import open_probe


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The shared run as the whole model of an ablation of which nothing else is trained."""
    overrides = {**tiny_run.TINY, "data.corpus": str(tiny_run.corpus()),
                 "model.paths": tiny_run.PATHS, "model.hopfield.depth_schedule": (2,)}
    made = Study(tmp_path_factory.mktemp("knockout"), make_grid(defaults(), overrides, [], 2))
    shutil.copytree(tiny_run.trained(), made.folder(made.grid["full"], 0).path)
    return made


def test_every_subset_is_measured_for_every_finished_seed(study):
    said: list[str] = []
    (found,) = measure(study, said.append)
    assert (found.whole, found.seed) == ("full", 0)
    assert set(found.losses) == {("hopfield", "attention"), ("hopfield",), ("attention",)}
    assert said == ["=== knock-outs of full, seed 0"]
    assert found.protocol.weights == "ema" and found.protocol.split == "validation"
    # 598 predictions are 37 windows of 16; batches of 6 leave one out, of 8 five.
    assert found.protocol.tokens == 36 * 16


def test_a_knockout_is_the_model_without_those_paths(study):
    run = study.folder(study.grid["full"], 0).path
    probe = open_probe(run, max_windows=0)
    found = losses(probe, ("attention",))
    lm = hippocampus.load(run)

    @jax.jit
    def summed(batch, renormalize):
        changed = Interventions(path_mask_LP=jnp.array([[0.0, 0.0, 1.0]]), renormalize=renormalize)
        hidden_BTD, _, _ = lm.model.apply({"params": lm.params}, batch, method="forward",
                                          interventions=changed)
        nll_BT = token_nll(hidden_BTD, lm.model.head(lm.params), batch.targets_BT)
        return (nll_BT * batch.loss_weight_BT).sum()

    weight = sum(float(batch.loss_weight_BT.sum()) for batch in probe.batches)
    expected = [sum(float(summed(batch, jnp.asarray(renormalize))) for batch in probe.batches)
                / weight for renormalize in (True, False)]
    assert found == pytest.approx(tuple(expected), rel=1e-6)
    assert found[0] != found[1]


def test_with_all_paths_it_is_the_evaluation_of_the_run(study):
    run = study.folder(study.grid["full"], 0).path
    report, _ = evaluate_run(run, Request(weights="ema"), out=study.out / "evaluated")
    (whole,) = [row for row in report.table.rows if row.kind == "model"]
    probe = open_probe(run, max_windows=0)
    renormalised, raw = losses(probe, tiny_run.PATHS)
    assert renormalised == raw
    # The probe leaves out what fills no whole batch of windows.
    assert renormalised == pytest.approx(whole.nats_per_token, abs=0.05)
