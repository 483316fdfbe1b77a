"""The causal convolution against its sum, and its borders."""

import jax
import numpy as np
import pytest

from hippocampus.ops.causal_conv import causal_conv
from hippocampus.testing import assert_close, check_causality, check_document_isolation

B, T, E = 2, 9, 3
IDS = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 1 + [2] * 5 + [3] * 3], np.int32)


def reference(x, kernel, bias, ids=None):
    y = np.zeros(x.shape)
    for b, t in np.ndindex(B, x.shape[1]):
        y[b, t] = bias
        for j in range(min(len(kernel), t + 1)):
            if ids is None or ids[b, t - j] == ids[b, t]:
                y[b, t] += kernel[j].astype(np.float64) * x[b, t - j]
    return y


def inputs(W, T=T):
    rng = np.random.default_rng(W)
    return tuple(rng.normal(size=shape).astype(np.float32)
                 for shape in ((B, T, E), (W, E), (E,)))


@pytest.mark.parametrize("W", [1, 2, 4, 12])
@pytest.mark.parametrize("ids", [None, IDS])
def test_values_are_those_of_the_sum(W, ids):
    x, kernel, bias = inputs(W)
    assert_close(causal_conv(x, kernel, bias, document_ids_BT=ids),
                 reference(x, kernel, bias, ids), n_operations=W)


def test_more_taps_than_tokens_are_fine():
    x, kernel, bias = inputs(5, T=2)
    assert_close(causal_conv(x, kernel, bias), reference(x, kernel, bias), n_operations=2)


def test_the_future_and_other_documents_have_no_part():
    x, kernel, bias = (jax.numpy.asarray(a) for a in inputs(4))
    check_causality(lambda x: causal_conv(x, kernel, bias), x)
    check_document_isolation(
        lambda x, ids, _: causal_conv(x, kernel, bias, document_ids_BT=ids), x, (3, 2, 3))
