"""A time axis that is cut over devices changes neither values nor gradients."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))

import eight_devices
import sequence_shards

QUICK = [(1, 2, 2, 2)]
MORE = [(1, 1, 1, 8), (1, 1, 2, 4), (2, 2, 1, 2), (8, 1, 1, 1), (1, 1, 8, 1)]
# Of epsilon times the largest value: the sums of a few dozen terms come in another order.
TOLERANCE = 40


def distances(shapes: list[tuple[int, int, int, int]]) -> dict[str, dict[str, float]]:
    return eight_devices.on_eight_devices(
        Path(sequence_shards.__file__), json.dumps(shapes))[0]


@pytest.mark.parametrize(
    "shape", [*QUICK, *(pytest.param(shape, marks=pytest.mark.full) for shape in MORE)])
def test_ops_give_the_values_and_gradients_of_a_whole_time_axis(shape):
    found = distances(QUICK if shape in QUICK else MORE)[str(shape)]
    assert len(found) == 29
    far = {name: distance for name, distance in found.items() if not distance < TOLERANCE}
    assert not far
