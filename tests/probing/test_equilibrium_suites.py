"""The suites of an equilibrium model, on a tiny one and on one whose cell was made to expand."""

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import planted
import pytest
from planted import column, table

from hippocampus.config_files import defaults, load_config
from hippocampus.generation.language_model import LanguageModel
from hippocampus.models.build_model import build_model
from hippocampus.probing.equilibrium import system
from hippocampus.probing.equilibrium.trials import Trial, cost_table
from hippocampus.probing.probe import about
from hippocampus.probing.results import read_suite, write_suite
from hippocampus.probing.suites import (
    SkipSuite,
    associative_recall,
    continual,
    energy_landscape,
    equilibrium,
    run_suites,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

SUITES = (equilibrium, energy_landscape, associative_recall, continual)
TINY = {
    "data.context": planted.CONTEXT, "model.vocab_size": 256, "model.d_model": 16,
    "model.n_layers": 0, "model.n_heads": 2, "model.compute_dtype": "float32",
    "model.hopfield.n_slots": 5, "model.hopfield.patterns": "both",
    "model.cell.parts": ("hopfield",), "model.solver.max_iterations": 20,
    "model.solver.backward_iterations": 20, "model.solver.memory": 2,
    "model.solver.method": "picard"}
"""Context patterns let tokens see each other; a state-space layer would take time to compile."""

FEW = {
    equilibrium: equilibrium.Settings(
        tokens=2 * planted.CONTEXT, iterations=40, schedules=("alternating", "cascade"),
        methods=("picard",), starts=1, row=planted.CONTEXT, power=(2, 8), steps=3),
    energy_landscape: energy_landscape.Settings(
        tokens=2 * planted.CONTEXT, length=planted.CONTEXT, starts=3, grid=7, radii=(0.1, 3.0),
        iterations=30, steps=3),
    associative_recall: associative_recall.Settings(
        noises=(0.0, 1.0), sizes=(5, 48), widths=(), cues=8, steps=3,
        keys=2 * planted.CONTEXT),
    continual: continual.Settings(tasks=2, steps=2, rows=4, length=8, measured=4)}


def probe_of(random_parameters, change=lambda params: params, **overrides):
    """A probe of a tiny equilibrium model of bytes, with changed random parameters."""
    config = load_config(defaults("equilibrium"), {**TINY, **overrides})
    model = build_model(config)
    usual = planted.probe_of(lambda _: (model, random_parameters(model)), lambda _: config)
    return with_params(usual, change(usual.params))


def with_params(probe, params):
    return dataclasses.replace(probe, lm=LanguageModel(
        probe.model, params, probe.lm.tokenizer, probe.config, probe.lm.step))


def louder(params, times):
    cell = params["cell"]
    return {**params, "cell": {**cell, "part_scale": times * cell["part_scale"]}}


@pytest.fixture(scope="module")
def calm(random_parameters):
    """A probe of a cell that contracts."""
    return probe_of(random_parameters, lambda params: louder(params, 0.5))


@pytest.fixture(scope="module")
def found(calm):
    """suite -> its result on the calm cell."""
    return functools.cache(lambda suite: suite.run(calm, FEW[suite]))


# ---------------------------------------------------------------- equilibrium

def test_a_cell_that_contracts_passes_every_check(found):
    result = found(equilibrium)
    flagged = [row["name"] for one in result.tables for row in one.rows if row.get("flag")]
    assert not flagged
    assert min(column(table(result, "solvers"), "converged")) == 1
    assert max(column(table(result, "agreement"), "largest_distance")) < 1e-2
    assert max(column(table(result, "starts"), "apart")) == 0
    assert {row["parameters"] for row in table(result, "solvers").rows} == {"trained", "untrained"}
    for name in ("before_2", "before_4", "before_30"):
        assert column(table(result, "causality"), name)[:-1] == [0, 0]
    assert set(column(table(result, "causality"), "after")) == {1.0}


def test_its_controls_fail_where_they_must(found):
    result = found(equilibrium)
    together = table(result, "causality").rows[-1]
    assert "control" in together["name"] and together["before"] > 0
    energy = table(result, "energy")
    assert column(energy, "rose", name="retrieval") == [0]
    assert column(energy, "rose", name="as long, astray")[0] > 0.2
    gradient = table(result, "gradient")
    assert column(gradient, "relative", name="implicit, all")[0] < 1e-4
    assert column(gradient, "relative", name="2 sweeps unrolled, all")[0] > 1e-2


def test_the_rate_is_what_the_contraction_says(found):
    """Where tokens depend on each other little, eight power iterations are near the rate."""
    for row in table(found(equilibrium), "rate").rows:
        assert 0 < row["low"] <= row["rate"] <= row["high"] < 1
        assert row["long"] == pytest.approx(row["rate"], rel=0.35)


def test_a_cascade_counts_the_updates_of_its_inner_solves(found):
    for row in table(found(equilibrium), "solvers").rows:
        one_each = row["schedule"] != "cascade"
        assert (row["updates"] == row["evaluations"]) == one_each
        assert row["updates"] <= 10 * row["evaluations"]


def test_a_method_is_set_beside_picard(calm):
    """Half of the sweeps, or at most half where Picard's were not enough."""
    def trial(method, sweeps, converged=True):
        tokens = np.full((1, 4), sweeps)
        return Trial("alternating", method, np.ones((1, 4, 2)), tokens > 0 if converged
                     else tokens < 0, tokens, np.full((1, 4), 1e-5), np.ones((sweeps, 1, 4)),
                     sweeps, sweeps, 0.1)

    for converged, said in ((True, "(50%)"), (False, "(at most 50%)")):
        own = {"trained": [trial("picard", 40, converged), trial("anderson", 20)]}
        found = cost_table(own, 1e-4, 40, calm.protocol)
        assert column(found, "of_picard", method="anderson") == [0.5]
        assert any(said in note for note in found.notes)


@pytest.mark.full
def test_all_solvers_of_a_whole_cell_agree(random_parameters):
    """The cell's state-space layer and MLP, and every schedule with every method."""
    whole = probe_of(random_parameters, lambda params: louder(params, 0.5), **{
        "model.cell.parts": ("ssm", "hopfield", "mlp"), "model.cell.mlp.width": 16,
        "model.n_layers": 1, "model.ssm.d_state": 4, "model.solver.method": "anderson"})
    result = equilibrium.run(whole, dataclasses.replace(
        FEW[equilibrium], schedules=system.SCHEDULES, methods=system.METHODS))
    flagged = [row["name"] for one in result.tables for row in one.rows if row.get("flag")]
    assert not flagged
    assert max(column(table(result, "agreement"), "largest_distance")) < 1e-2
    assert len(table(result, "causality").rows) == 10


def test_a_cell_that_expands_is_reported_and_every_number_is_one(calm):
    wild = with_params(calm, louder(calm.params, 200.0))
    result = equilibrium.run(wild, FEW[equilibrium])
    solvers = table(result, "solvers")
    assert [row["flag"] for row in solvers.rows if row["parameters"] == "trained"] == ["!"] * 2
    assert max(column(solvers, "converged", parameters="trained")) < 1
    assert "! some tokens did not converge" in solvers.notes
    causality = table(result, "causality")
    assert column(causality, "before")[:-1] == [0, 0]  # causal even so
    for one in result.tables:
        for row in one.rows:
            assert not any(isinstance(x, float) and not np.isfinite(x) for x in row.values()), row


# ---------------------------------------------------------------- the landscape

def test_the_fixed_point_is_the_lowest_point_of_its_slices_and_all_starts_come_back(found):
    result = found(energy_landscape)
    for name in ("residual", "energy"):
        rows = table(result, name).rows
        assert [row["name"] for row in rows] == [
            "trained, plane of trajectories", "trained, random plane",
            "untrained, plane of trajectories"]
        for row in rows:
            assert row["minima"] == 1 and row["off"] < 1e-9 and row["lowest"] <= row["center"]
    assert max(column(table(result, "residual"), "center")) < 1e-3
    basin = table(result, "basin")
    assert column(basin, "name") == ["picard, trained", "picard, untrained"]
    assert set(column(basin, "from_0.1") + column(basin, "from_3")) == {1.0}


def test_minima_of_a_grid_are_counted_without_its_edge():
    at = np.linspace(-1, 1, 21)
    wells = np.minimum((at[:, None] - 0.5) ** 2, (at[:, None] + 0.5) ** 2) + at**2
    assert energy_landscape.minima(wells) == 2
    assert energy_landscape.minima(at[:, None] + at) == 0


# ---------------------------------------------------------------- recall

def test_what_the_memory_has_stored_is_recalled_beside_controls(found):
    result = found(associative_recall)
    names = dict.fromkeys(row["stored"] for row in table(result, "noise").rows)
    assert list(names) == ["slots", "keys", "slots, shuffled", "keys, shuffled", "random"]
    clean = [row for row in table(result, "noise").rows if row["noise"] == 0]
    assert all(row["nearest_right"] == 1 for row in clean if row["stored"] != "keys")
    capacity = table(result, "capacity")
    assert column(capacity, "name") == ["8 wide, 5", "8 wide, 48"]
    heads = table(result, "heads").rows
    assert all(1 <= row["mixed"] <= row["patterns"] + 1e-3 for row in heads)


def test_a_silent_memory_is_missed_in_the_loss_where_the_text_needs_it(found, calm):
    rows = {row["name"]: row for row in table(found(associative_recall), "text").rows}
    assert set(rows) == {"baseline", "memory_silent", "memory_shuffled", "memory_untrained"}
    assert rows["memory_silent"]["delta"] != 0
    assert {row["category"] for row in rows.values()} == {"baseline", "memory"}
    mute = with_params(calm, {**calm.params, "cell": associative_recall._silent(
        calm.params["cell"], None)})
    damage = mute.measure().nats if hasattr(mute.measure(), "nats") else mute.measure().loss
    assert damage == pytest.approx(rows["memory_silent"]["loss"])


# ---------------------------------------------------------------- continual

def test_copies_are_taught_and_the_run_is_not(found, calm):
    before = jax.tree.map(np.array, calm.params)
    result = found(continual)
    courses = ["everything", "patterns frozen", "patterns only", "all at once"]
    assert column(table(result, "summary"), "name") == courses
    matrix = table(result, "matrix")
    for after in (0, 1, 2):
        assert len(column(matrix, "task_2", after=after)) == 4
    first = [[row[f"task_{j}_loss"] for j in range(3)] for row in matrix.rows if not row["after"]]
    assert first == [first[0]] * 4  # all copies begin as the run is
    taught = column(matrix, "task_1_loss", trained="everything")
    assert taught[1] < taught[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, before, calm.params))


def test_masks_part_the_patterns_from_everything_else(calm):
    masks = continual.masks(calm)
    frozen, only = masks["patterns frozen"], masks["patterns only"]
    assert frozen["cell"]["slots"] == 0 == frozen["cell"]["key"]["kernel"]
    total = jax.tree.map(lambda a, b: a + b, frozen, only)
    assert jax.tree.all(jax.tree.map(lambda x: x == 1, total))
    assert frozen["embedding"] == 1 and frozen["cell"]["query"]["kernel"] == 1


# ---------------------------------------------------------------- all of them

def test_models_without_a_fixed_point_or_a_memory_are_left_out_in_a_line(random_parameters):
    explicit = probe_of(random_parameters, **{"model.solver.method": "explicit"})
    bare = probe_of(random_parameters, **{"model.cell.parts": ("mlp",)})
    for suite in (equilibrium, energy_landscape):
        with pytest.raises(SkipSuite, match="no fixed point"):
            suite.run(explicit)
    with pytest.raises(SkipSuite, match="the cell has no memory"):
        associative_recall.run(bare)


def test_a_hybrid_model_leaves_them_out_in_a_line():
    hybrid = SimpleNamespace(config=load_config(defaults("hybrid")))
    said = []
    names = [suite.__name__.rsplit(".", 1)[1] for suite in SUITES]
    assert run_suites(hybrid, names, said.append) == []
    assert said == [f"{name}: left out, it looks into equilibrium models, and this is of the "
                    "hybrid family" for name in names]
    for suite in SUITES:  # by itself, too
        with pytest.raises(SkipSuite, match="hybrid family"):
            suite.run(hybrid)


@pytest.mark.parametrize("suite", SUITES)
def test_a_result_is_written_as_json_csv_and_pictures(suite, found, calm, tmp_path):
    result = found(suite)
    path = write_suite(tmp_path, result, about(calm))
    again, _ = read_suite(path)
    assert [one.name for one in again.tables] == [one.name for one in result.tables]
    written = {file.name for file in Path(tmp_path).iterdir()}
    assert written == {path.name, *(f"{result.suite}_{one.name}.csv" for one in result.tables),
                       *(f"{result.suite}_{plot.name}.svg" for plot in result.plots)}
    for one in result.tables:
        assert one.protocols[0].text == "words" and one.all_notes


def test_rows_of_a_batch_are_cut_to_so_many_tokens(calm):
    batch = calm.host_batches[0]
    length = planted.CONTEXT
    assert system.some_rows(batch, 2 * length + 3).tokens_BT.shape == (2, length)
    assert system.some_rows(batch, 5).tokens_BT.shape == (1, 5)
