"""The loss terms of an equilibrium model on a cell that is linear, and the rule for its solver."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.data.batches import Batch
from hippocampus.training import equilibrium
from hippocampus.training.equilibrium import equilibrium_terms, expansion, too_few_converge

B, T, S = 4, 256, 6
KEY = jax.random.key(3)
DRAW = np.random.default_rng(0)
STATE = DRAW.normal(size=(B, T, S)).astype(np.float32)
DRIVE = DRAW.normal(size=(B, T, S)).astype(np.float32)
WEIGHT = DRAW.integers(0, 2, (B, T)).astype(np.float32)
ENERGY = DRAW.uniform(size=(B, T)).astype(np.float32)
ROTATION = np.linalg.qr(DRAW.normal(size=(S, S)))[0].astype(np.float32)


class Linear:
    """A model whose sweep is s W + u."""

    def apply(self, variables: Any, state, drive, documents, positions, *, method: str):
        assert method == "sweep" and documents is None
        return state @ variables["params"]["W"] + drive


def terms(matrix, state, drive=DRIVE, key=KEY, **loss):
    """The terms of weights, each a weight and an unscaled sum."""
    config = tiny_run.config(model__family="equilibrium", **{
        f"loss__equilibrium__{name}": value for name, value in loss.items()})
    tokens = jnp.zeros((B, T), jnp.int32)
    out = {"solver.state": jnp.asarray(state), "injection": jnp.asarray(drive),
           "energy.total": jnp.asarray(ENERGY)}
    return equilibrium_terms(Linear(), {"W": jnp.asarray(matrix)},
                             Batch(tokens, tokens, jnp.asarray(WEIGHT)), out, key, config)


ALL = {"energy_weight": 0.3, "convergence_weight": 2.0, "jacobian_weight": 0.1,
       "jacobian_chance": 1.0, "contraction_weight": 1.0, "contraction_target": 0.8}


@jax.jit
def values(matrix, state=STATE):
    """All terms of a matrix, as means over the tokens that count."""
    return {name: value / WEIGHT.sum() for name, (_, value) in
            terms(matrix, state, **ALL).items()}


def test_without_weights_there_is_no_term_and_no_sweep():
    assert terms(ROTATION, STATE) == {}


def test_terms_have_their_weights_and_what_is_only_logged_has_none():
    scales: list[dict] = []
    jax.eval_shape(lambda: scales.append({name: scale for name, (scale, _) in
                                          terms(ROTATION, STATE, **ALL).items()}))
    assert scales == [{"energy": 0.3, "convergence": 2.0, "jacobian": 0.1, "contraction": 1.0,
                       "solver/contraction": 0.0}]


def test_the_energy_is_that_of_the_tokens_that_count():
    wanted = (ENERGY * WEIGHT).sum() / WEIGHT.sum()
    assert float(values(ROTATION)["energy"]) == pytest.approx(wanted, rel=1e-5)


def test_convergence_is_the_squared_relative_residual_and_0_at_a_fixed_point():
    after = STATE @ (0.9 * ROTATION) + DRIVE
    wanted = ((after - STATE) ** 2).sum(-1) / (after**2).sum(-1)
    found = float(values(0.9 * ROTATION)["convergence"])
    assert found == pytest.approx((wanted * WEIGHT).sum() / WEIGHT.sum(), rel=1e-4)
    fixed = DRIVE @ np.linalg.inv(np.eye(S, dtype=np.float32) - 0.9 * ROTATION)
    assert float(values(0.9 * ROTATION, fixed)["convergence"]) < 1e-10


def test_the_jacobian_s_size_is_estimated_without_bias():
    """|W|^2 / S on average over the vectors of a thousand tokens; a rotation's is 0.81."""
    matrix = DRAW.normal(size=(S, S)).astype(np.float32)
    for W in (0.9 * ROTATION, matrix):
        assert float(values(W)["jacobian"]) == pytest.approx((W**2).sum() / S, rel=0.1)


def test_the_jacobian_s_term_is_in_a_share_of_the_steps():
    def value(key: Any) -> Any:
        return terms(ROTATION, STATE, key=key, jacobian_weight=1.0, jacobian_chance=0.3)[
            "jacobian"][1]

    found = np.asarray(jax.jit(lambda keys: jax.lax.map(value, keys))(jax.random.split(KEY, 200)))
    assert (found > 0).mean() == pytest.approx(0.3, abs=0.1)
    assert len(np.unique(found)) == 1 + (found > 0).sum()  # every one has a vector of its own


def test_contraction_costs_nothing_below_its_target_and_is_reported():
    found = values(0.9 * ROTATION)
    assert float(found["contraction"]) == pytest.approx(0.1**2, rel=1e-3)
    assert float(found["solver/contraction"]) == pytest.approx(0.9, rel=1e-5)
    assert float(values(0.5 * ROTATION)["contraction"]) == 0


def test_terms_change_what_the_cell_does_and_not_where_it_was_solved():
    found = jax.jit(jax.jacrev(values, argnums=(0, 1)))(0.9 * ROTATION, STATE)
    for name in ("convergence", "jacobian", "contraction"):
        gradient, of_state = (np.asarray(array) for array in found[name])
        assert np.abs(gradient).max() > 1e-3 and not np.abs(of_state).any(), name
        lower = 0.9 * ROTATION - 1e-3 * gradient / np.linalg.norm(gradient)
        assert values(lower)[name] < values(0.9 * ROTATION)[name], name


# ---------------------------------------------------------------- a cell that does not contract

def model(**solver: Any):
    return tiny_run.config(model__family="equilibrium", **{
        f"model__solver__{name}": value for name, value in solver.items()}).model


VALUES = {"solver/converged": 0.25, "solver/rate": 1.07}


def test_too_few_tokens_that_converge_are_one_line_with_estimate_and_step():
    line = expansion(model(), 120, VALUES, 0.5)
    assert line == ("at step 120, 25.0% of the tokens reached their fixed point (wanted: 50%); "
                    "residuals go with a factor of 1.07 a sweep: the cell does not contract")
    assert "more sweeps" in expansion(model(), 120, {**VALUES, "solver/rate": 0.95}, 0.5)
    assert "does not contract" in expansion(model(), 1, {**VALUES, "solver/rate": np.nan}, 0.5)
    assert expansion(model(), 120, {**VALUES, "solver/converged": 0.5}, 0.5) == ""
    assert expansion(model(least_converged=0.2), 120, VALUES, 0.5) == ""


@pytest.mark.parametrize(("progress", "applies"), [(0.0, False), (0.29, False), (0.31, True)])
def test_the_rule_waits_for_the_curriculum(progress, applies):
    curriculum = model(warmup_fraction=0.1, warmup_iterations=1, ramp_fraction=0.2)
    assert bool(too_few_converge(curriculum, 0.1, progress)) == applies
    assert bool(expansion(curriculum, 1, VALUES, progress)) == applies


def test_a_model_without_tolerance_or_without_solver_has_no_rule():
    assert not too_few_converge(model(tol_fixedpoint=0.0), 0.0, 1.0)
    assert not too_few_converge(model(method="explicit"), 0.0, 1.0)
    assert expansion(tiny_run.config().model, 5, VALUES, 1.0) == ""
    assert expansion(model(method="explicit"), 5, {}, 1.0) == ""


def test_only_the_rules_that_say_so_leave_a_step_out_or_end_the_run():
    rules = {rule: model(on_expansion=rule) for rule in ("report", "skip", "stop")}
    assert [rule for rule, own in rules.items() if equilibrium.skips_expansion(own)] == ["skip"]
    assert [rule for rule, own in rules.items() if equilibrium.stops_at_expansion(own)] == ["stop"]
    hybrid = tiny_run.config().model
    assert not equilibrium.skips_expansion(hybrid) and not equilibrium.stops_at_expansion(hybrid)


def test_a_curriculum_is_known_by_its_fractions():
    assert equilibrium.has_curriculum(model(ramp_fraction=0.1))
    assert not equilibrium.has_curriculum(model())
    assert not equilibrium.has_curriculum(tiny_run.config().model)
