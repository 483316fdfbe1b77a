"""Statistics of gates and slots: of known arrays, and the same in one batch or in many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.models import adapter_statistics
from hippocampus.models.adapter_statistics import (
    BIN,
    distributions,
    duplicates,
    effective_slots,
    gate_summary,
    merge,
    percentiles,
    slot_summary,
    token_sums,
)

RNG = np.random.default_rng(0)

layer_sums = jax.jit(adapter_statistics.layer_sums, static_argnums=1)


def out_of(gate_BTG, weights_BTS, scale=None):
    found = {"layers.3.adapter.gate": jnp.asarray(gate_BTG, jnp.float32),
             "layers.3.adapter.weights": jnp.asarray(weights_BTS, jnp.float32),
             "layers.3.adapter.out": jnp.full((*np.shape(gate_BTG)[:2], 4), 2.0)}
    return found if scale is None else {**found, "layers.3.adapter.scale": jnp.float32(scale)}


def soft(shape, sharp=3.0):
    x = np.exp(sharp * RNG.normal(size=shape))
    return x / x.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def arrays():
    """Gates around 0.4 with a tenth of them shut, weights over 8 slots, and padding."""
    gate = np.clip(0.4 + 0.1 * RNG.normal(size=(6, 16, 3)), 0.01, 0.99)
    gate[:, ::10] = 0.00004
    weight = (RNG.random((6, 16)) < 0.8).astype(np.float32)
    return gate, soft((6, 16, 8)), weight


def test_gates_have_the_statistics_of_their_tokens(arrays):
    gate, weights, weight = arrays
    found = gate_summary(merge([layer_sums(out_of(gate, weights, 0.25), 3, jnp.asarray(weight))]))
    own = gate[weight > 0].ravel()
    assert found.tokens == weight.sum()
    np.testing.assert_allclose([found.mean, found.sd], [own.mean(), own.std()], rtol=1e-5)
    np.testing.assert_allclose(found.percentiles, np.percentile(
        own, (5, 25, 50, 75, 95), method="inverted_cdf"), atol=0.51 * BIN)
    assert found.closed == pytest.approx((own < 1e-4).mean(), rel=1e-5)
    assert (found.opened, found.scale) == (0, 0.25)
    assert found.saturated == found.closed


def test_saturated_gates_are_counted_on_both_sides():
    gate = np.array([0.0, 0.00009, 1 / (1 + np.exp(9.0)), 0.5, 0.99991]).reshape(1, 5, 1)
    found = gate_summary(merge([layer_sums(out_of(gate, soft((1, 5, 4))), 3, jnp.ones((1, 5)))]))
    assert (found.closed, found.opened) == (pytest.approx(0.4), pytest.approx(0.2))
    assert found.scale is None


def test_many_batches_give_what_one_does(arrays):
    gate, weights, weight = arrays
    whole = merge([layer_sums(out_of(gate, weights), 3, jnp.asarray(weight))])
    parts = merge(layer_sums(out_of(gate[i : i + 2], weights[i : i + 2]), 3,
                             jnp.asarray(weight[i : i + 2])) for i in (0, 2, 4))
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    with pytest.raises(ValueError, match="no batch"):
        merge([])


def test_a_spread_far_below_the_mean_survives_many_batches():
    gates = 0.5 + 1e-4 * RNG.normal(size=(40, 1, 64, 1))
    found = gate_summary(merge(layer_sums(out_of(gate, soft((1, 64, 4))), 3, jnp.ones((1, 64)))
                               for gate in gates))
    assert found.sd == pytest.approx(gates.std(), rel=1e-2)


def test_use_of_slots_is_the_mean_of_what_tokens_read(arrays):
    gate, weights, weight = arrays
    found = slot_summary(merge([layer_sums(out_of(gate, weights), 3, jnp.asarray(weight))]))
    np.testing.assert_allclose(found.usage_S, weights[weight > 0].mean(0), rtol=1e-4)
    assert sum(found.usage_S) == pytest.approx(1, abs=1e-5)
    assert found.hottest(2) == tuple(np.argsort(-weights[weight > 0].mean(0))[:2])
    rows = weights[weight > 0]
    assert found.read_entropy == pytest.approx(-(rows * np.log(rows)).sum(1).mean(), rel=1e-4)


@pytest.mark.parametrize(("usage", "effective", "dead"), [
    (np.full(20, 0.05), 20, 0), (np.eye(20)[3], 1, 19),
    (np.array([0.25] * 4 + [0.0] * 16), 4, 16),
    (np.array([0.996] + [0.004] + [0.0] * 18), np.exp(-0.996 * np.log(0.996)
                                                      - 0.004 * np.log(0.004)), 19)])
def test_effective_and_dead_slots_of_known_use(usage, effective, dead):
    weights = np.broadcast_to(usage, (2, 3, 20))
    found = slot_summary(merge([layer_sums(out_of(np.full((2, 3, 1), 0.5), weights), 3,
                                           jnp.ones((2, 3)))]))
    assert found.effective == pytest.approx(effective, rel=1e-4)
    assert found.effective_share == pytest.approx(effective / 20, rel=1e-4)
    assert found.dead == dead


def test_a_slot_that_repeats_an_earlier_one_is_a_duplicate():
    slots = RNG.normal(size=(10, 2, 8))
    assert duplicates(slots) == 0
    slots[4], slots[7] = 3 * slots[1], slots[1] + 0.01  # the length does not matter
    slots[9] = -slots[2]                                # the opposite is no duplicate
    assert duplicates(slots) == 2


def test_what_is_no_number_shows():
    gate = np.full((1, 4, 1), 0.5)
    gate[0, 2] = np.nan
    found = gate_summary(merge([layer_sums(out_of(gate, soft((1, 4, 4))), 3, jnp.ones((1, 4)))]))
    assert np.isnan(found.mean)
    assert np.isnan(effective_slots(np.array([0.5, np.nan])))
    assert np.isnan(percentiles(np.zeros(10))).all()


def test_what_training_logs_is_the_batchs_own(arrays):
    gate, weights, weight = arrays
    out = out_of(gate, weights, -0.5)
    found = {name: float(value) / weight.sum()
             for name, value in token_sums([3], out, jnp.asarray(weight)).items()}
    sums = merge([layer_sums(out, 3, jnp.asarray(weight))])
    slots, gates = slot_summary(sums), gate_summary(sums)
    wanted = {"gate": gates.mean, "saturated": gates.saturated, "effective_slots": slots.effective,
              "dead_slots": slots.dead, "added": 2.0, "scale": -0.5}
    assert found == {f"adapters/{name}/3": pytest.approx(value, rel=1e-4)
                     for name, value in wanted.items()}
    drawn = distributions([3], out)
    assert set(drawn) == {"adapters/gate/layer_3", "adapters/slot_use/layer_3"}
    assert float(drawn["adapters/slot_use/layer_3"].mean()) == pytest.approx(1, rel=1e-5)
