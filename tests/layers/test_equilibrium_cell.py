"""The cell: its retrieval descends its energy, it contracts at first, and it keeps what is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import MLPConfig, SSMConfig
from hippocampus.config_equilibrium import CellConfig, CellHopfieldConfig
from hippocampus.layers.equilibrium_cell import EquilibriumCell, first_beta
from hippocampus.ops.jacobian import contraction
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, H = 2, 12, 16, 2
U = jax.random.normal(jax.random.key(0), (B, T, D))
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
XI = jax.random.normal(jax.random.key(1), (B, T, H, D // H))
Z = jax.random.normal(jax.random.key(2), (B, T, D))


def cell_of(**memory):
    config = CellConfig(ssm=SSMConfig(expansion=1.0, backend="chunked"), mlp=MLPConfig(width=16))
    return EquilibriumCell(config, CellHopfieldConfig(**{"n_slots": 5, **memory}), D, H)


@functools.cache
def first_parameters(cell):
    return jax.jit(cell.init)(jax.random.key(3), U, POSITIONS)["params"]


def call(cell, method, *inputs, **options):
    return cell.apply({"params": first_parameters(cell)}, *inputs, method=method, **options)


@functools.cache
def drive_of(cell):
    params = first_parameters(cell)  # not inside: what is made there is gone with its trace
    return jax.jit(lambda: cell.apply({"params": params}, U, None, POSITIONS, method="drive"))()


@pytest.mark.parametrize("memory", [
    {}, {"patterns": "both", "normalize": "rms", "step_size": 0.4, "anchor": 2.5}])
def test_a_retrieval_is_a_step_of_gradient_descent_on_the_energy(memory):
    cell = cell_of(**memory)
    drive, size = drive_of(cell), cell.memory.step_size / (1 + cell.memory.anchor)

    @jax.jit
    def run(xi):
        def energy(xi):
            return call(cell, "energies", call(cell, "join", Z, xi), drive)["total"].sum()

        return call(cell, "retrieve", xi, Z, drive), xi - size * jax.grad(energy)(xi)

    stepped, descended = run(XI)
    assert_close(stepped, descended, n_operations=D * T)
    assert np.abs(stepped - XI).max() > 0.1


@pytest.mark.parametrize("memory", [
    {"patterns": "context"},
    {"patterns": "both", "normalize": "rms", "step_size": 0.4, "anchor": 2.5}])
def test_the_energy_never_rises_along_retrieval_at_a_fixed_state(memory):
    cell = cell_of(**memory)
    drive = drive_of(cell)

    @jax.jit
    def step(xi):
        energies = call(cell, "energies", call(cell, "join", Z, xi), drive)
        return call(cell, "retrieve", xi, Z, drive), energies

    xi, trace = 3 * XI, []
    for _ in range(12):
        xi, energies = step(xi)
        trace.append(energies["total"])
        assert min(energies["retrieval"].min(), energies["anchor"].min()) > -1e-5
    trace = np.stack(trace)
    assert (np.diff(trace, axis=0) <= 1e-6 * np.abs(trace[:-1])).all()
    assert (trace[-1] < 0.9 * trace[0]).all()


def test_several_steps_are_single_steps_and_a_trust_radius_holds_each():
    cell = cell_of()

    @jax.jit
    def run(drive):
        once = call(cell, "retrieve", XI, Z, drive)
        return (once, call(cell, "retrieve", once, Z, drive),
                call(cell, "retrieve", XI, Z, drive, steps=2),
                call(cell, "retrieve", XI, Z, drive, trust_radius=0.1))

    once, again, twice, held = run(drive_of(cell))
    assert_close(twice, again, n_operations=D)
    moves = np.linalg.norm(held - XI, axis=-1)
    np.testing.assert_allclose(moves, np.minimum(0.1, np.linalg.norm(once - XI, axis=-1)),
                               rtol=1e-4)


def test_the_first_state_is_what_the_update_gives_without_its_parts():
    cell = cell_of()
    params = first_parameters(cell)
    bare = {**params, "part_scale": jnp.zeros_like(params["part_scale"])}

    @jax.jit
    def run(drive):
        first = call(cell, "first_state", drive)
        z, xi = call(cell, "split", first)
        return (first, z, xi, call(cell, "query_of", z),
                cell.apply({"params": bare}, Z, XI, drive, method="update"))

    first, z, xi, query, updated = run(drive_of(cell))
    assert_close(updated, z, n_operations=D)
    assert_close(query, xi, n_operations=D)
    np.testing.assert_allclose((first * first).mean(-1), 1, rtol=1e-3)


@pytest.mark.parametrize(("patterns", "schedule"), [
    ("slots", "alternating"), ("context", "simultaneous")])
def test_a_fresh_cell_contracts(patterns, schedule):
    cell = cell_of(patterns=patterns)
    drive = drive_of(cell)

    def sweep(s, params):
        return cell.apply({"params": params}, s, drive, schedule, method="sweep")

    @jax.jit
    def run(params):
        s = jax.lax.fori_loop(0, 60, lambda _, s: sweep(s, params), call(
            cell, "first_state", drive))
        return contraction(sweep, s, params, jax.random.key(4), iterations=10), s, sweep(s, params)

    rho, s, again = run(first_parameters(cell))
    assert (rho < 0.9).all() and (rho > 0.1).all()
    assert np.abs(again - s).max() < 0.01


def test_two_keys_and_an_anchor_bound_the_first_temperature():
    assert first_beta(CellHopfieldConfig(), 64) == 8
    assert first_beta(CellHopfieldConfig(patterns="context", anchor=2.0), 64) == 3
    assert first_beta(CellHopfieldConfig(patterns="both", normalize="rms"), 64) == 2 / 64


def test_without_a_part_its_parameters_are_not_there_and_the_state_is_narrower():
    config = CellConfig(parts=("mlp",), mlp=MLPConfig(width=16))
    cell = EquilibriumCell(config, CellHopfieldConfig(), D, H)
    shapes = jax.eval_shape(cell.init, jax.random.key(0), U, POSITIONS)["params"]
    assert set(shapes) == {"inject", "mix", "norm_in", "norm_state", "part_scale", "mlp"}
    drive = jax.eval_shape(lambda p: cell.apply({"params": p}, U, None, POSITIONS,
                                                method="drive"), shapes)
    first = jax.eval_shape(lambda p, drive: cell.apply(
        {"params": p}, drive, method="first_state"), shapes, drive)
    assert first.shape == (B, T, D)


def test_fused_attention_retrieves_what_blocks_do():
    """On a CPU the fused backends are XLA's attention; the path to them is the same."""
    cell = cell_of(patterns="context")
    fused, params = cell.clone(backend="cudnn"), first_parameters(cell)

    @jax.jit
    def run(drive):
        return (fused.apply({"params": params}, XI, Z, drive, method="retrieve"),
                call(cell, "retrieve", XI, Z, drive))

    assert_close(*run(drive_of(cell)), n_operations=T * D)
