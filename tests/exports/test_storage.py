"""Matrices in fewer bits: what is lost, and what is not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hippocampus.exports.storage import (
    TensorSpec,
    decode,
    dequantize,
    encode,
    quantize,
    stored_specs,
    summed_axis,
)

SHAPES = {"a.kernel": (6, 4), "ssm.gates.kernel": (2, 3, 6), "embedding": (8, 5), "head": (8, 5),
          "head_down": (6, 5), "hopfield.slots": (7, 2, 3), "position_embedding": (9, 4)}


@pytest.mark.parametrize(("name", "channels"), [
    ("a.kernel", (1, 4)), ("ssm.gates.kernel", (2, 1, 6)), ("embedding", (8, 1)), ("head", (8, 1)),
    ("head_down", (1, 5)), ("hopfield.slots", (7, 2, 1)), ("position_embedding", (9, 1))])
def test_a_scale_belongs_to_an_output_channel(name, channels):
    specs = stored_specs({name: SHAPES[name]}, "int8")
    assert specs == {name: TensorSpec("int8", SHAPES[name]),
                     f"{name}.scale": TensorSpec("float32", channels)}
    stored = encode(name, np.ones(SHAPES[name], np.float32), "int8")
    assert {n: (str(a.dtype), a.shape) for n, a in stored.items()} == specs


@pytest.mark.parametrize(("name", "shape"), [
    ("norm.scale", (4,)), ("a.bias", (4,)), ("ssm.conv_kernel", (4, 8)), ("ssm.log_decay", (8, 4)),
    ("ssm.input_kernel", (8, 4)), ("ssm.gates.bias", (2, 8)), ("flow.time_kernel", (8,))])
@pytest.mark.parametrize("storage", ["int8", "bfloat16"])
def test_what_is_small_or_delicate_stays_float32(name, shape, storage):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assert stored_specs({name: shape}, storage) == {name: TensorSpec("float32", shape)}
    stored = encode(name, weight, storage)
    assert list(stored) == [name] and stored[name].tobytes() == weight.tobytes()


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)), st.floats(-37, 37))
@settings(max_examples=100, deadline=None)
def test_int8_is_wrong_by_half_a_scale_at_most(seed, name, exponent):
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=SHAPES[name]) * 10.0**exponent).astype(np.float32)
    quantized, scale = quantize(weight, summed_axis(name, weight.shape))
    # A little more than a half: the product is rounded to float32.
    error = np.abs(dequantize(quantized, scale).astype(np.float64) - weight)
    assert (error <= scale * (0.5 + 1e-5)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(SHAPES)), st.integers(-20, 20))
@settings(max_examples=50, deadline=None)
def test_what_int8_can_express_comes_back_exactly(seed, name, exponent):
    rng, shape = np.random.default_rng(seed), SHAPES[name]
    whole = rng.integers(-127, 128, shape)
    np.moveaxis(whole, summed_axis(name, shape), 0)[0] = 127
    weight = (whole * 2.0**exponent).astype(np.float32)
    stored = encode(name, weight, "int8")
    np.testing.assert_array_equal(
        decode(name, TensorSpec("int8", shape), stored.__getitem__), weight)


def test_channels_of_zeros_and_of_the_smallest_numbers_come_back():
    weight = np.zeros((3, 2), np.float32)
    weight[:, 1] = 1e-44
    stored = encode("a.kernel", weight, "int8")
    np.testing.assert_array_equal(dequantize(*stored.values()), 0)


def test_one_large_weight_costs_only_its_own_channel():
    weight = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    large = weight.copy()
    large[0, 0] = 1e4
    plain, other = (dequantize(*quantize(w, -2)) for w in (weight, large))
    np.testing.assert_array_equal(plain[:, 1:], other[:, 1:])


def test_bfloat16_is_the_nearest_and_what_it_can_express_comes_back_exactly():
    weight = np.float32([[1.0, 1 + 2**-8, 1 + 3 * 2**-9, -0.5]])
    stored = encode("a.kernel", weight, "bfloat16")
    back = decode("a.kernel", TensorSpec("bfloat16", weight.shape), stored.__getitem__)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, [[1.0, 1.0, 1 + 2**-7, -0.5]])
