"""Gate series against sums by hand."""

import numpy as np
import pytest

from hippocampus.models.gate_statistics import distributions, token_sums
from hippocampus.models.hybrid_block import BlockSpec

SPECS = (BlockSpec(("ssm", "attention"), 0, (0.5, 0.5)),
         BlockSpec(("hopfield", "attention"), 2, (0.5, 0.5)))


@pytest.fixture
def out():
    rng = np.random.default_rng(0)
    gates = rng.dirichlet((1, 1), (2, 3, 4)).astype(np.float32)  # layer, B, T, P
    return {"layers.0.mixer.gates": gates[0], "layers.1.mixer.gates": gates[1],
            "layers.0.mixer.entropy": -(gates[0] * np.log(gates[0])).sum(-1),
            "layers.1.mixer.entropy": -(gates[1] * np.log(gates[1])).sum(-1),
            "layers.1.hopfield.depth_gates": rng.dirichlet((1, 1), (3, 4)).astype(np.float32)}


def test_sums_are_weighted_means_over_the_layers_that_have_the_path(out):
    weight = np.zeros((3, 4), np.float32)
    weight[0, 1], weight[2, 3] = 1.0, 2.0

    def total(values):
        return values[0, 1] + 2 * values[2, 3]

    sums = token_sums(SPECS, out, weight)
    first, second = out["layers.0.mixer.gates"], out["layers.1.mixer.gates"]
    assert sums["mixer/gate/ssm"] == pytest.approx(total(first[..., 0]), rel=1e-6)
    assert sums["mixer/gate/hopfield"] == pytest.approx(total(second[..., 0]), rel=1e-6)
    assert sums["mixer/gate/attention"] == pytest.approx(
        (total(first[..., 1]) + total(second[..., 1])) / 2, rel=1e-6)
    assert sums["mixer/entropy"] == pytest.approx(
        (total(out["layers.0.mixer.entropy"]) + total(out["layers.1.mixer.entropy"])) / 2, rel=1e-6)
    depth = out["layers.1.hopfield.depth_gates"] @ np.array([1.0, 2.0])
    assert sums["hopfield/depth"] == pytest.approx(total(depth), rel=1e-6)


def test_distributions_name_the_layer_and_the_path(out):
    values = distributions(SPECS, out)
    assert set(values) == {
        "mixer/gate/ssm/layer_0", "mixer/gate/attention/layer_0", "mixer/gate/hopfield/layer_1",
        "mixer/gate/attention/layer_1", "hopfield/depth/layer_1"}
    np.testing.assert_array_equal(values["mixer/gate/hopfield/layer_1"],
                                  out["layers.1.mixer.gates"][..., 0])
