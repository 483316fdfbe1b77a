"""The plain cross-entropy of a model on held-out text."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from hippocampus.data.evaluation_windows import EvaluationWindows
from hippocampus.evaluation.evaluate import Evaluation, evaluate
from hippocampus.models.build_model import build_model


@pytest.fixture(scope="module")
def model_and_params():
    model = build_model(tiny_run.config(model__vocab_size=40, model__dropout=0.5))
    return model, jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]


def by_hand(model, params, ids: np.ndarray, context: int) -> list[float]:
    """-log p of every id but the first, each from its own window."""
    forward, nats = jax.jit(model.apply), []
    for start in range(0, len(ids) - 1, context):
        window = ids[start:start + context + 1]
        padded = np.zeros(context, np.int32)
        padded[:len(window) - 1] = window[:-1]
        logits, _ = forward({"params": params}, jnp.asarray(padded)[None])
        log_p = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        nats += [-log_p[t, target] for t, target in enumerate(window[1:])]
    return nats


@pytest.mark.parametrize("n", [2, 17, 33, 150], ids=lambda n: f"{n} ids")
def test_evaluation_is_the_mean_over_every_prediction(model_and_params, n):
    # 150 ids are ten windows of 16, the last of them short, in three batches of four.
    ids = np.random.default_rng(n).integers(0, 40, n).astype(np.int32)
    found = evaluate(*model_and_params, EvaluationWindows(ids, 16, 4), 1.0)
    wanted = by_hand(*model_and_params, ids, 16)
    assert found.tokens == len(wanted) == n - 1
    assert found.nats_per_token == pytest.approx(np.mean(wanted), rel=1e-5)


def test_batch_size_does_not_matter(model_and_params):
    ids = np.random.default_rng(0).integers(0, 40, 90).astype(np.int32)
    one, other = (evaluate(*model_and_params, EvaluationWindows(ids, 16, size), 1.0)
                  for size in (4, 3))
    assert one.nats_per_token == pytest.approx(other.nats_per_token, rel=1e-6)
    assert one.tokens == other.tokens


def test_every_batch_is_placed(model_and_params):
    ids, placed = np.arange(100, dtype=np.int32) % 40, []
    evaluate(*model_and_params, EvaluationWindows(ids, 16, 4), 1.0,
             lambda batch: placed.append(batch) or batch)
    assert len(placed) == 2


def test_evaluation_is_deterministic(model_and_params):
    ids = np.arange(60, dtype=np.int32) % 40
    first, second = (evaluate(*model_and_params, EvaluationWindows(ids, 16, 4), 1.0)
                     for _ in range(2))
    assert first == second


@pytest.mark.parametrize("bytes_per_token", [1.0, 3.5])
def test_bits_per_byte_is_nats_over_ln_2_and_bytes(bytes_per_token):
    found = Evaluation(nats_per_token=2.0, tokens=10, bytes_per_token=bytes_per_token)
    assert found.bits_per_byte == pytest.approx(2.0 / math.log(2) / bytes_per_token)
    uniform = Evaluation(nats_per_token=math.log(256), tokens=1, bytes_per_token=1.0)
    assert uniform.bits_per_byte == pytest.approx(8.0)
