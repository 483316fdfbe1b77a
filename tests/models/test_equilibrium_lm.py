"""The equilibrium model: causal at any number of sweeps, one fixed point, and its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config_equilibrium import SolverConfig
from hippocampus.data.batches import Batch
from hippocampus.errors import ConfigError
from hippocampus.layers.equilibrium_solver import effort_at, rate
from hippocampus.models import taps
from hippocampus.models.build_model import count_parameters, parameter_shapes
from hippocampus.models.interventions import Interventions
from hippocampus.testing import (
    assert_close,
    check_batch_invariance,
    check_causality,
    check_causality_by_gradient,
    check_document_isolation,
    pack,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, V = 2, 24, 16, 31
LENGTHS = (9, 1, 11)  # and three tokens of padding
TOKENS = jax.random.randint(jax.random.key(0), (B, T), 0, V, jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
ONE = jnp.ones((B, T), jnp.int32)
SWEEPS = {2: 0.0, 4: 2 / 28, 30: 1.0}
"""Progress of the training at which the model makes so many."""
SOLVERS = [
    pytest.param(schedule, method, id=f"{schedule}-{method}",
                 marks=() if (schedule, method) in (
                     ("alternating", "anderson"), ("simultaneous", "picard"),
                     ("cascade", "broyden")) else pytest.mark.full)
    for schedule in ("alternating", "simultaneous", "cascade")
    for method in ("anderson", "picard", "broyden")]
CELL_ONLY = {"model.n_layers": 0, "model.hopfield.patterns": "slots"}
CONVERGED = CELL_ONLY | {
    "model.solver.tol_fixedpoint": 0.0, "model.solver.max_iterations": 50,
    "model.solver.backward_iterations": 50, "model.solver.backward_tol": 1e-7}


def solver(schedule, method):
    return {"model.solver.schedule": schedule, "model.solver.method": method}


def batch_of(tokens, ids=None, positions=None, reset=None):
    return Batch(tokens, tokens, jnp.ones(tokens.shape), ids, positions, reset)


@functools.cache
def forward(model):
    """(params, tokens, ids, positions, progress) -> what each token has of the forward pass."""
    @jax.jit
    def run(params, tokens, ids, positions, progress):
        hidden, out, _ = model.apply({"params": params}, batch_of(tokens, ids, positions),
                                     progress=progress, method="forward")
        names = ("converged", "iterations", "residual", "state")
        return {"hidden": hidden, **{name: out[f"solver.{name}"] for name in names},
                "trace": jnp.moveaxis(out["solver.residual_trace"], 0, 2)}

    return run


@functools.cache
def loss_and_gradient(model):
    """Compiled: parameters -> ((loss, which tokens converged), gradient)."""
    def run(params):
        def loss(params):
            hidden, out, _ = model.apply({"params": params}, batch_of(TOKENS[:, :12]),
                                         method="forward", train=True)
            weights = jax.random.normal(jax.random.key(3), hidden.shape)
            return (hidden * weights).sum(), out["solver.converged"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    return jax.jit(run).lower(parameter_shapes(model)).compile()


# ---------------------------------------------------------------- causality and isolation

@pytest.mark.parametrize("sweeps", SWEEPS)
@pytest.mark.parametrize(("schedule", "method"), SOLVERS)
def test_a_token_reads_the_past_of_its_own_row_and_document_at_any_number_of_sweeps(
        schedule, method, sweeps, built_equilibrium):
    model, params = built_equilibrium(solver(schedule, method))
    run, packed = functools.partial(forward(model), params), pack(LENGTHS, B, T)
    progress = SWEEPS[sweeps]
    found = run(TOKENS, ONE, POSITIONS, progress)
    assert found["iterations"].max() == sweeps or found["converged"].all()
    check_causality(lambda tokens: run(tokens, ONE, POSITIONS, progress), TOKENS, jit=False)
    check_causality(lambda tokens: run(tokens, *packed, progress), TOKENS, jit=False,
                    positions=(0, 8, 9, 10, 20, 21))
    check_batch_invariance(lambda tokens: run(tokens, *packed, progress), TOKENS, jit=False)
    # To rounding where no residual is near the tolerance that ends a token.
    check_document_isolation(
        lambda *inputs: run(*inputs, progress)["hidden" if sweeps < 30 else "state"],
        TOKENS, LENGTHS, n_operations=T * D * (8 if sweeps < 30 else 10**4), jit=False)


def test_no_gradient_reaches_the_future(built_equilibrium):
    model, params = built_equilibrium({"model.n_layers": 0})
    ids, positions = pack(LENGTHS, 1, T)

    def apply(x_BTD):
        table = params["embedding"].at[:T].set(x_BTD[0])
        hidden, _, _ = model.apply({"params": {**params, "embedding": table}},
                                   batch_of(jnp.arange(T)[None], ids, positions),
                                   progress=1.0, method="forward")
        return hidden

    check_causality_by_gradient(apply, params["embedding"][None, :T], positions=(0, 5, 8, 9, 23))


# ---------------------------------------------------------------- the fixed point

def test_all_schedules_and_methods_find_the_same_fixed_point(built_equilibrium):
    found = []
    for schedule, method in (("alternating", "anderson"), ("simultaneous", "picard"),
                             ("cascade", "broyden")):
        model, params = built_equilibrium(solver(schedule, method))
        found.append(forward(model)(params, TOKENS, ONE, POSITIONS, 1.0))
        assert found[-1]["converged"].all()
    for other in found[1:]:
        np.testing.assert_allclose(other["state"], found[0]["state"], atol=2e-4)
    assert np.abs(found[0]["trace"][..., 0]).min() > 0.01  # none began there
    assert found[2]["iterations"].mean() < found[1]["iterations"].mean()


def test_the_implicit_gradient_is_that_of_long_unrolling(built_equilibrium):
    implicit, params = built_equilibrium(CONVERGED)
    unrolled, _ = built_equilibrium(CONVERGED | {
        "model.solver.gradient": "unroll", "model.solver.method": "picard"})
    (value, _), gradient = loss_and_gradient(implicit)(params)
    (expected, _), wanted = loss_and_gradient(unrolled)(params)
    assert_close(value, expected, n_operations=12 * D)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        own = functools.reduce(lambda tree, key: tree[key.key], path, gradient)
        size = np.abs(leaf).max()
        assert size > 0 and np.abs(own - leaf).max() <= 1e-5 * size, jax.tree_util.keystr(path)


def test_a_cell_that_expands_is_told_and_stays_finite(built_equilibrium):
    model, params = built_equilibrium(CONVERGED)
    cell = {**params["cell"], "part_scale": 50 * params["cell"]["part_scale"]}
    (value, converged), gradient = loss_and_gradient(model)({**params, "cell": cell})
    assert np.isfinite(value) and not converged.any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.full
def test_the_memory_of_the_implicit_gradient_does_not_grow_with_the_sweeps(built_equilibrium):
    def scratch(max_iterations):
        model, _ = built_equilibrium(CONVERGED | {
            "model.solver.max_iterations": max_iterations})
        return loss_and_gradient(model).memory_analysis().temp_size_in_bytes

    trace = 4 * B * 12 * (50 - 5)  # the residuals, which have the sweeps as an axis
    assert scratch(50) <= scratch(5) + 2 * trace


# ---------------------------------------------------------------- what training has

def test_the_curriculum_ramps_sweeps_and_tolerances():
    config = SolverConfig(warmup_fraction=0.1, ramp_fraction=0.4, warmup_iterations=4,
                          max_iterations=24, tol_fixedpoint=1e-3, tol_energy=0.1, ramp_tol=100.0,
                          jitter=2)
    for progress, limit, factor in ((0.1, 4, 100), (0.3, 14, 10), (0.5, 24, 1), (0.9, 24, 1)):
        effort = effort_at(config, jnp.float32(progress))
        assert int(effort.limit) == limit
        assert float(effort.tol) == pytest.approx(1e-3 * factor, rel=1e-4)
        assert float(effort.tol_energy) == pytest.approx(0.1 * factor, rel=1e-4)
    drawn = {int(effort_at(config, jnp.float32(0.3), jax.random.key(i)).limit) for i in range(40)}
    assert drawn == {12, 13, 14, 15, 16}


@pytest.fixture(scope="module")
def warmed(built_equilibrium):
    """What a cell alone gives in its warm-up of three sweeps, that many by hand, and solved."""
    model, params = built_equilibrium(CELL_ONLY | {
        "model.solver.ramp_fraction": 0.0, "model.solver.warmup_fraction": 0.5,
        "model.solver.warmup_iterations": 3})
    variables = {"params": params}

    @jax.jit
    def run(progress):
        hidden, out, _ = model.apply(variables, batch_of(TOKENS), progress=progress,
                                     method="forward")
        drive = (out["injection"], None, None)
        s = model.apply(variables, *drive, method="first_state")
        for _ in range(3):
            s = model.apply(variables, s, *drive, "alternating", method="sweep")
        return {**out, "logits": model.head(params).logits(hidden)[..., :V]}, s

    return *run(0.49), run(0.5)[0]


def test_the_warm_up_makes_its_sweeps_then_the_solver_takes_over(warmed):
    out, swept, solved = warmed
    assert out["solver.evaluations"] == 3 and not out["solver.converged"].all()
    assert (out["solver.iterations"] == 3).all()
    assert_close(out["solver.state"], swept, n_operations=T * D)
    assert solved["solver.evaluations"] > 3 and solved["solver.converged"].all()


def test_a_stream_goes_on_from_its_last_state_within_its_document(built_equilibrium):
    model, params = built_equilibrium(CELL_ONLY | {
        "model.solver.warm_start": "stream", "data.order": "streams"})
    ids = jnp.asarray([[1] * 12, [1] * 5 + [2] * 7])

    @jax.jit
    def run(state, reset):
        _, out, state = model.apply(
            {"params": params}, batch_of(TOKENS[:, :12], ids, None, reset), state,
            method="forward")
        return out["solver.residual_trace"][0], out["solver.state"], state

    state = model.init_state(batch_of(TOKENS))
    assert state["z_last"].shape == (B, 2 * D)
    fresh, found, carried = run(state, jnp.asarray([True, True]))
    np.testing.assert_array_equal(carried["z_last"], found[:, -1])
    first, again, _ = run(carried, jnp.asarray([False, False]))
    begun = np.asarray([[False] * 12, [False] * 5 + [True] * 7])
    assert (np.asarray(first == fresh) == begun).all()
    np.testing.assert_allclose(again, found, atol=2e-4)
    row, _, _ = run(carried, jnp.asarray([True, False]))
    np.testing.assert_array_equal(row[0], fresh[0])
    np.testing.assert_array_equal(row[1], first[1])


def test_the_rate_is_the_geometric_mean_of_the_residuals_quotients():
    trace = jnp.asarray([[[1.0, 0.5, 0.3]], [[0.5, 0.5, 0.3]], [[0.25, 0.5, 0.3]]])
    np.testing.assert_allclose(rate(trace, jnp.asarray([[3, 1, 2]])), [[0.5, 0.0, 1.0]])


# ---------------------------------------------------------------- without a fixed point

def test_explicit_cells_use_all_their_parameters_and_dropout_draws_by_its_key(
        built_equilibrium):
    model, params = built_equilibrium({
        "model.solver.method": "explicit", "model.dropout": 0.5,
        "model.solver.ramp_fraction": 0.0, "model.tie_embeddings": False})
    assert set(params) == {"embedding", "head", "layers_0", "cells_0", "norm_injection", "out",
                           "norm_out"}

    @jax.jit
    def run(params, key):
        def loss(params):
            hidden, out, _ = model.apply({"params": params}, batch_of(TOKENS), train=True,
                                         rngs={"dropout": key}, method="forward")
            assert not any(name.startswith("solver.") for name in out)
            return jax.nn.log_softmax(model.head(params).logits(hidden)[..., :V])[..., 0].sum()

        return jax.value_and_grad(loss)(params)

    keys = jax.random.split(jax.random.key(0))
    (value, gradient), (other, _) = (run(params, key) for key in keys)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert value != other and value == run(params, keys[0])[0]


# ---------------------------------------------------------------- the public call, names, refusals

def test_bfloat16_finds_the_fixed_point_to_its_precision_and_logs_in_float32(
        built_equilibrium, warmed):
    model, params = built_equilibrium(CELL_ONLY | {"model.compute_dtype": "bfloat16"})

    @jax.jit
    def run(params):
        logits, out = model.apply({"params": params}, TOKENS)
        return logits, out, model.statistics(out, jnp.ones((B, T)) / (B * T))

    logits, out, sums = run(params)
    assert logits.dtype == jnp.float32 and logits.shape == (B, T, V)
    assert out["z_equilibrium"].dtype == jnp.float32 and out["solver.converged"].all()
    expected = warmed[-1]["logits"]
    assert np.abs(logits - expected).mean() < 0.05 * np.abs(expected).mean()
    assert set(sums) == {
        "solver/iterations", "solver/residual", "solver/converged", "solver/rate",
        "solver/evaluations", "energy/retrieval", "energy/anchor", "energy/total"}
    assert sums["solver/converged"] == pytest.approx(1) and 1e-4 < sums["solver/residual"] < 4e-3
    energy = out["solver.energy_trace"]
    assert energy.shape == (30, B, T) and energy.dtype == jnp.float32
    last = np.take_along_axis(energy, out["solver.iterations"][None] - 1, 0)[0]
    np.testing.assert_allclose(last, out["energy.total"], rtol=0.02)


def test_values_have_names_and_can_be_edited(built_equilibrium):
    model, params = built_equilibrium(CELL_ONLY | {"model.n_layers": 1})
    names = taps.editable_names(model, params, TOKENS)
    assert {"embedding", "layers.0.mixer.out", "layers.0.residual", "injection", "z_equilibrium",
            "residual"} <= set(names)
    shapes = jax.eval_shape(lambda p: model.apply({"params": p}, TOKENS)[1], params)
    assert shapes["segments.hidden"].shape == (1, B, T, D)
    assert shapes["cell.query"].shape == (B, T, 2, D // 2)
    assert shapes["solver.residual_trace"].shape == (30, B, T)
    hidden = jax.eval_shape(lambda p: model.apply(
        {"params": p}, batch_of(TOKENS), train=True, method="forward")[1], params)
    assert set(shapes) - set(hidden) == {"solver.energy_trace"}


def test_an_edit_of_the_equilibrium_reaches_the_logits(built_equilibrium):
    model, params = built_equilibrium({"model.solver.method": "explicit",
                                       "model.solver.ramp_fraction": 0.0, "model.n_layers": 0})
    bare = {**params, "out": jax.tree.map(jnp.zeros_like, params["out"])}
    edited = model.clone(edit=lambda name, x: 0 * x if name == "z_equilibrium" else x)
    plain, without, zero = jax.jit(lambda: [
        model_.apply({"params": tree}, TOKENS)[0]
        for model_, tree in ((model, params), (model, bare), (edited, params))])()
    assert_close(zero, without, n_operations=D)
    assert np.abs(plain - zero).max() > 0.01


def test_parts_of_the_hybrid_are_refused_by_name(built_equilibrium):
    model, params = built_equilibrium(CELL_ONLY)
    with pytest.raises(ConfigError, match="segments"):
        model.apply({"params": params}, batch_of(TOKENS), method="forward",
                    interventions=Interventions(segments=2))


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_padding_of_the_tables_is_not_counted(tied, tables, built_equilibrium):
    model, _ = built_equilibrium({"model.tie_embeddings": tied})
    leaves = jax.tree.leaves(parameter_shapes(model))
    padded = [leaf for leaf in leaves if leaf.shape == (128, D)]
    assert len(padded) == tables
    assert count_parameters(model) == (
        sum(leaf.size for leaf in leaves) - tables * (128 - V) * D)
