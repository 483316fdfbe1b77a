"""Whole runs of an equilibrium model: they resume bit for bit, and every verb works on them."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_run
from test_kill import kill_and_finish, usual_seconds_of_a_save

import hippocampus.compare
import hippocampus.evaluate
import hippocampus.export
import hippocampus.plan
import hippocampus.probe
import hippocampus.sample
import hippocampus.train
from hippocampus.errors import Diverged
from hippocampus.exports.folder import FILES
from hippocampus.generation.loading import load
from hippocampus.runs.run_folder import read_metrics
from hippocampus.training import equilibrium, loop
from hippocampus.training.loop import fit
from hippocampus.training.run import Run

pytestmark = pytest.mark.usefixtures("quick_compiles")

STEPS, HALF = 6, 4
RUN: dict[str, Any] = {
    "model__family": "equilibrium", "train__steps": STEPS, "train__grad_accumulation": 2,
    "model__n_layers": 0, "model__cell__parts": ("hopfield", "mlp"),
    "model__solver__method": "picard", "model__dropout": 0.1, "data__order": "streams",
    "model__solver__warm_start": "stream",
    "model__solver__warmup_fraction": 0.3, "model__solver__ramp_fraction": 0.3,
    "model__solver__jitter": 1, "model__solver__max_iterations": 4,
    "model__solver__least_converged": 1.0, "loss__equilibrium__jacobian_weight": 0.1,
    "optimizer__groups": (("slots$", 0.5, 0.0),), "log__every_steps": 1, "eval__every_steps": 3,
    "checkpoint__every_steps": 2, "checkpoint__keep_latest": 100, "sample__max_new_tokens": 2}
"""Random numbers, what is carried and the curriculum: all that a resumed run must not lose, on a
model that compiles fast."""


@pytest.fixture(scope="module")
def compiled_once():
    """All runs of this module have one step."""
    steps: list[Any] = []
    jit = loop.jit_train_step

    def once(*arguments: Any) -> Any:
        steps[:] = steps or [jit(*arguments)]
        return steps[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "jit_train_step", once)
        yield


@pytest.fixture(scope="module")
def run(compiled_once, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("equilibrium")
    with (folder / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        return fit(tiny_run.config(**RUN), folder / "run")


@pytest.mark.full
def test_a_run_that_was_killed_goes_on_bit_for_bit(run, compiled_once, tmp_path):
    """As after kill -9: steps are missing from some step on, and rows are there beyond it."""
    killed = shutil.copytree(run, tmp_path / "killed")
    for step in (killed / "steps").iterdir():
        if step.name.isdecimal() and int(step.name) > HALF:
            shutil.rmtree(step)
    for gone in ("results.json", "samples", "evaluations"):
        path = killed / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    fit(tiny_run.config(**RUN), killed)
    assert tiny_run.series(killed) == tiny_run.series(run)
    found, wanted = (tiny_run.digests(folder, STEPS) for folder in (killed, run))
    assert set(found) == {"params", "ema", "optimizer", "guard", "progress", "carried"}
    assert found == wanted
    assert (killed / "results.json").read_text() == (run / "results.json").read_text()


def test_metrics_tell_what_the_solver_does(run):
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]
    assert len(rows) == STEPS
    for row in rows:
        assert {"solver/converged", "solver/iterations", "solver/residual", "solver/rate",
                "energy/total", "energy/retrieval", "energy/anchor", "train/jacobian"} <= row.keys()
        assert row["energy/total"] == pytest.approx(row["energy/retrieval"] + row["energy/anchor"],
                                                    rel=1e-5)
    assert [row["solver/iterations"] for row in rows[:2]] == [2, 2]  # the warm-up
    assert rows[-1]["solver/iterations"] > 2


def test_a_cell_that_does_not_converge_is_reported_once_and_only_after_the_curriculum(run):
    """In the run all tokens have to converge: some do not from step 5 on, and in step 6."""
    (line,) = [line for line in (run.parent / "printed").read_text().splitlines()
               if "reached their fixed point" in line]
    assert line.startswith("warning: at step 5, ") and "(wanted: 100%)" in line
    assert "does not contract" in line or "would need more sweeps" in line
    assert line.endswith("allow more model.solver.max_iterations)")


def watch(rule: str) -> list[str]:
    """What is said of three logged steps under a rule."""
    said: list[str] = []
    config = tiny_run.config(**RUN, model__solver__on_expansion=rule)
    run: Any = SimpleNamespace(config=config, expands=False,
                               console=SimpleNamespace(say=said.append))
    for step, share in ((2, 0.1), (5, 1.0), (6, 0.1), (6, 0.2), (6, 1.0), (6, 0.3)):
        Run.watch_solver(run, step, {"solver/converged": share, "solver/rate": 1.5})
    return said


def test_it_is_said_again_only_when_the_cell_had_converged_in_between():
    first, second = watch("report")
    assert "at step 6, 10.0%" in first and "at step 6, 30.0%" in second


def test_the_rule_may_end_the_run():
    with pytest.raises(Diverged, match=r"^at step 6, 10.0% of the tokens reached") as caught:
        watch("stop")
    assert caught.value.hint == equilibrium.HINT


def test_evaluation_finds_what_the_run_found(run, tmp_path):
    hippocampus.evaluate.main([f"--workdir={run}", f"--out={tmp_path}"])
    (found,) = tmp_path.glob("validation-*.json")
    rows = {row["weights"]: row for row in json.loads(found.read_text())["rows"]
            if row.get("weights")}
    results = json.loads((run / "results.json").read_text())
    assert rows["ema"]["nats_per_token"] == pytest.approx(results["final/loss"], rel=1e-6)


def test_an_export_is_the_model_and_its_card_says_what_it_is(run, tmp_path, capsys):
    hippocampus.export.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "| family | equilibrium |" in card and "deep-equilibrium-model" in card
    assert "the fixed point of a cell of Hopfield memory + MLP: picard, alternating" in card
    texts = []
    capsys.readouterr()
    for folder in (run, tmp_path / "out"):
        hippocampus.sample.main([f"--workdir={folder}", "--prompt=the ", "--max_new_tokens=2"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("the ")


def test_a_model_without_passes_or_flow_refuses_them(run):
    lm = load(run)
    assert lm.room("the ") == float("inf") and lm.context == 16
    with pytest.raises(Exception, match="segments is 2, and the model was trained with one pass"):
        lm.generate("the ", segments=2)
    with pytest.raises(Exception, match="skip needs a segment flow"):
        lm.generate("the ", skip=True)


def test_probes_that_fit_are_measured_and_the_others_left_out_in_a_line(run, tmp_path, capsys):
    hippocampus.probe.main([f"--workdir={run}", "--suite=paths,segments,hopfield,flow,lens",
                            f"--out={tmp_path}", "--max_windows=8"])
    printed = " ".join(capsys.readouterr().out.split())
    for name in ("paths", "segments", "hopfield", "flow"):
        assert f"{name}: left out, it looks into hybrid models, and this is of the " in printed
    states = [row["state"] for table in json.loads((tmp_path / "lens.json").read_text())["tables"]
              for row in table["rows"]]
    assert states == ["embedding", "cell"]
    page = (tmp_path / "report.html").read_text()
    assert "the fixed point of a cell of Hopfield memory + MLP" in page
    assert "Converged tokens" in page and "Rate of convergence" in page


def test_check_plan_and_comparison_take_it(run, tmp_path, capsys):
    config = tiny_run.command(tmp_path / "new", **RUN)[3:]
    hippocampus.train.main([*config, "--check"])
    assert "the config is good" in capsys.readouterr().out
    hippocampus.plan.main([*(flag for flag in config if not flag.startswith("--workdir")),
                           "--topology=h100x2", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["flops_per_step"] > 0 and plan["parameters"] > 5000
    other = shutil.copytree(run, tmp_path / "other")
    hippocampus.compare.main([str(run), str(other), f"--out={tmp_path / 'compared'}"])
    assert list((tmp_path / "compared").iterdir())


@pytest.mark.full
def test_a_run_that_is_killed_at_random_moments_ends_as_if_never_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the processes

    def command(workdir: Path) -> list[str]:
        return tiny_run.command(workdir, **{**RUN, "model__n_layers": 1, "train__steps": 16})

    seconds = usual_seconds_of_a_save(command(tmp_path / "whole"))
    kill_and_finish(tmp_path / "killed", seconds, ["save", "steps", "save"],
                    command(tmp_path / "killed"), at_least=1)
    assert tiny_run.series(tmp_path / "killed") == tiny_run.series(tmp_path / "whole")
    assert tiny_run.digests(tmp_path / "killed", 16) == tiny_run.digests(tmp_path / "whole", 16)
