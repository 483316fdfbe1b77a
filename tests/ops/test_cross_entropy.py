"""Cross-entropy against its formulas in float64: values, gradients, padding, both backends."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_xla
import tiny_run

from hippocampus.errors import ConfigError
from hippocampus.ops import cross_entropy as module
from hippocampus.ops import logit_ratios
from hippocampus.ops.cross_entropy import Head, cross_entropy, token_nll
from hippocampus.testing import assert_close

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, V, ROWS = 2, 11, 6, 7, 10  # 10 rows of which 7 are ids
SETTINGS = {
    "plain": {},
    "smoothing": {"smoothing": 0.2},
    "z": {"z_weight": 0.1},
    "all": {"smoothing": 0.1, "z_weight": 0.01},
}


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    weight = rng.normal(size=(ROWS, D)).astype(np.float32)
    bias = rng.normal(size=ROWS).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    token_weight = rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32)
    return hidden, weight, bias, targets, token_weight


def reference(hidden, weight, bias, targets, token_weight, *, softcap=0.0, smoothing=0.0,
              z_weight=0.0):
    """Loss, terms and the gradients by hand (hidden, weight, bias) in float64."""
    hidden, weight, bias = (np.asarray(a, np.float64) for a in (hidden, weight, bias))
    raw = hidden @ weight[:V].T + bias[:V]
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    one_hot = np.eye(V)[targets]
    nll, uniform = -(one_hot * log_p).sum(-1), -log_p.mean(-1)
    terms = {"nll": (token_weight * nll).sum(), "z": (token_weight * log_z**2).sum(),
             "smoothing": (token_weight * uniform).sum() if smoothing else 0.0}
    loss = ((1 - smoothing) * terms["nll"] + smoothing * terms["smoothing"]
            + z_weight * terms["z"])
    p = np.exp(log_p)
    d_logits = p - (1 - smoothing) * one_hot - smoothing / V + 2 * z_weight * log_z[..., None] * p
    d_raw = token_weight[..., None] * d_logits * (1 - (logits / softcap) ** 2 if softcap else 1)
    d_weight, d_bias = np.zeros_like(weight), np.zeros_like(bias)
    d_weight[:V] = np.einsum("btv,btd->vd", d_raw, hidden)
    d_bias[:V] = d_raw.sum((0, 1))
    return loss, terms, (d_raw @ weight[:V], d_weight, d_bias)


@functools.cache
def value_and_gradients(settings, backend, softcap):
    @jax.jit
    def run(hidden, weight, bias, targets, token_weight):
        def loss(hidden, weight, bias):
            return cross_entropy(hidden, Head(weight, bias, softcap, V), targets, token_weight,
                                 backend=backend, **SETTINGS[settings])

        (value, terms), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
            hidden, weight, bias)
        return value, terms, gradients

    return run


@pytest.mark.parametrize("backend", ["full", "chunked", "fused"])
@pytest.mark.parametrize(("settings", "softcap"), [
    ("plain", 0.0), ("smoothing", 0.0), ("z", 0.0), ("all", 0.0), ("z", 3.0), ("all", 3.0)])
def test_loss_terms_and_gradients_are_those_of_the_formulas(settings, softcap, backend,
                                                            monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", 8 * ROWS)  # chunks of 4, 4 and 3 time steps
    actual = value_and_gradients(settings, backend, softcap)(*inputs())
    expected = reference(*inputs(), softcap=softcap, **SETTINGS[settings])
    assert_close(actual, expected, n_operations=B * T * V)


@pytest.mark.parametrize("backend", ["full", "chunked", "fused"])
def test_rows_that_pad_the_vocabulary_have_no_part_in_anything(backend):
    hidden, weight, *rest = inputs()
    run = value_and_gradients("all", backend, 0.0)
    plain = run(hidden, weight, *rest)
    padded = weight.copy()
    padded[V:] = 100.0
    loud = run(hidden, padded, *rest)
    jax.tree.map(np.testing.assert_array_equal, plain, loud)
    assert not np.asarray(plain[2][1])[V:].any()
    assert np.asarray(plain[2][1])[:V].any()


@pytest.mark.parametrize("backend", ["full", "chunked", "fused"])
def test_tokens_of_weight_zero_are_not_counted(backend):
    hidden, weight, bias, targets, token_weight = inputs()
    run = value_and_gradients("all", backend, 0.0)
    out = (token_weight == 0)
    assert out.any()
    plain = run(hidden, weight, bias, targets, token_weight)
    changed = run(hidden, weight, bias, np.where(out, (targets + 1) % V, targets), token_weight)
    jax.tree.map(np.testing.assert_array_equal, plain, changed)
    assert not np.asarray(plain[2][0])[out].any()


@pytest.mark.parametrize("chunk_tokens", [1, 2, 6, 22, 4096])
def test_any_chunk_size_gives_the_same_sums(chunk_tokens, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk_tokens * ROWS)
    hidden, weight, bias, targets, token_weight = inputs()
    loss, _ = cross_entropy(hidden, Head(weight, bias, 0.0, V), targets, token_weight,
                            smoothing=0.1, backend="chunked")
    expected, *_ = reference(hidden, weight, bias, targets, token_weight, smoothing=0.1)
    assert_close(loss, expected, n_operations=B * T * V)


def test_the_terms_have_no_gradient():
    hidden, weight, bias, targets, token_weight = inputs()

    def terms(hidden):
        return sum(jax.tree.leaves(cross_entropy(
            hidden, Head(weight, bias, 0.0, V), targets, token_weight, smoothing=0.1)[1]))

    assert not np.asarray(jax.grad(terms)(hidden)).any()


def test_the_nll_of_each_token_adds_up_to_the_loss():
    hidden, weight, bias, targets, token_weight = inputs()
    head = Head(weight, bias, 2.0, V)
    nll = token_nll(hidden, head, targets)
    assert nll.shape == (B, T)
    loss, _ = cross_entropy(hidden, head, targets, token_weight)
    assert_close((nll * token_weight).sum(), loss, n_operations=B * T)


def test_logits_of_padding_are_minus_infinity_and_a_softcap_bounds_the_others():
    hidden, weight, *_ = inputs()
    logits = np.asarray(Head(weight * 100, None, 5.0, V).logits(hidden))
    assert (logits[..., V:] == -np.inf).all()
    assert np.abs(logits[..., :V]).max() <= 5.0
    assert np.isfinite(Head(weight).logits(hidden)).all()  # no vocabulary size: nothing is padding


def test_bfloat16_states_give_float32_logits_and_loss():
    hidden, weight, bias, targets, token_weight = inputs()
    head = Head(weight, bias, 0.0, V)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    assert head.logits(hidden).dtype == jnp.float32
    loss, _ = cross_entropy(hidden, head, targets, token_weight)
    expected, *_ = reference(hidden.astype(np.float32), weight, bias, targets, token_weight)
    assert loss.dtype == jnp.float32
    assert_close(loss, expected, dtype=jnp.bfloat16)


@pytest.mark.parametrize("backend", ["full", "chunked", "fused"])
@pytest.mark.parametrize(("ids", "rows", "length", "softcap"), [
    (V, ROWS, 3, 0.0), (V, ROWS, 1, 30.0), (1, 1, 3, 0.0), (1, 4, 1, 0.0)])
def test_loss_and_gradients_are_finite_at_logits_of_ten_thousand(backend, ids, rows, length,
                                                                softcap):
    draw = np.random.default_rng(0)
    hidden, table = (50 * draw.choice([-1.0, 1.0], shape) for shape in ((B, length, 4), (rows, 4)))
    logits = hidden @ table.T
    assert abs(logits).max() == 1e4
    targets = jnp.asarray(logits[..., :ids].argmin(-1))  # the least likely: the largest loss

    @jax.jit
    def run(hidden, table, weight):
        def loss(hidden, table, weight):
            return cross_entropy(hidden, Head(table, None, softcap, ids), targets, weight,
                                 smoothing=0.1, z_weight=1e-2, backend=backend)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(hidden, table, weight)

    counted, masked = (
        run(jnp.float32(hidden), jnp.float32(table), jnp.full((B, length), weight))
        for weight in (1.0, 0.0))
    for leaf in jax.tree.leaves((counted, masked)):
        assert np.isfinite(leaf).all()
    (loss, _), (d_hidden, d_table, _) = masked
    assert loss == 0 and not d_hidden.any() and not d_table.any()
    if ids == 1:
        assert counted[0][1]["nll"] == 0


@pytest.mark.parametrize("backend", ["chunked", "fused"])
@pytest.mark.parametrize("size", [20.0, 60.0, 100.0])
def test_losses_beyond_the_range_of_a_ratio_have_the_same_gradients(size, backend):
    hidden, weight, bias, targets, token_weight = inputs()
    arguments = (size * hidden, weight, bias, targets, token_weight)
    expected = reference(*arguments, **SETTINGS["all"])
    nll = np.asarray(token_nll(arguments[0], Head(weight, bias, 0.0, V), targets))
    assert nll.max() > {20.0: 60, 60.0: 200, 100.0: 400}[size]
    actual = value_and_gradients("all", backend, 0.0)(*arguments)
    assert_close(actual, expected, n_operations=size * B * T * V)


@pytest.mark.parametrize("largest", [10.0, 50.0])
def test_ratios_say_when_they_do_not_fit(largest):
    hidden = jnp.asarray([[[largest], [1.0]]])
    head = Head(jnp.asarray([[0.0], [1.0], [1.5]]))
    targets = jnp.zeros((1, 2), jnp.int32)
    found, _ = logit_ratios.one_pass(head, hidden, targets, jnp.ones((1, 2)), n_ids=3,
                                     smoothing=0.0, z_weight=0.0, fused=False)
    assert bool(found.fits) == (largest == 10.0)
    none, _ = logit_ratios.one_pass(head, hidden * jnp.nan, targets, jnp.ones((1, 2)), n_ids=3,
                                    smoothing=0.0, z_weight=0.0, fused=False)
    assert not none.fits


def test_a_confident_prediction_keeps_the_digits_of_its_small_loss():
    """1 - p of 1e-9: log Z - logit would be rounded to 0."""
    head = Head(jnp.asarray([[20.0], [0.0]]))
    loss, gradient = jax.value_and_grad(lambda hidden: cross_entropy(
        hidden, head, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1)), backend="chunked")[0])(
            jnp.ones((1, 1, 1)))
    np.testing.assert_allclose(loss, np.log1p(np.exp(-20.0)), rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0, 0], -20 * np.exp(-20.0), rtol=1e-5)


def test_chunks_are_whole_tiles_of_a_matrix_product_where_they_are_that_long():
    for B, T, V in ((32, 1024, 50_304), (3, 4096, 32_768), (64, 1000, 50_304)):
        n, _, size = module._chunks(V, np.zeros((B, T)))[0].shape
        assert B * size % 128 == 0 and B * size * V <= module._CHUNK_LOGITS
        assert T <= n * size < T + size
        longer = module._chunks(V, np.zeros((B, T)), fused=True)[0].shape
        assert B * longer[2] % 128 == 0 and longer[2] >= size


def test_an_unknown_backend_is_refused_with_the_known_ones():
    hidden, weight, _, targets, token_weight = inputs()
    with pytest.raises(ConfigError, match="full, chunked, fused"):
        cross_entropy(hidden, Head(weight), targets, token_weight, backend="sparse")


def test_a_table_narrower_than_the_states_is_the_product_of_its_two_parts():
    hidden, weight, bias, targets, token_weight = inputs()
    down = np.random.default_rng(1).normal(size=(D, 3)).astype(np.float32)
    for backend in ("full", "chunked", "fused"):
        loss, gradient = jax.value_and_grad(lambda down, backend=backend: cross_entropy(
            hidden, Head(weight[:, :3], bias, 0.0, V, down), targets, token_weight,
            backend=backend)[0])(down)
        whole, _, (_, d_whole, _) = reference(hidden, weight[:, :3] @ down.T, bias, targets,
                                              token_weight)
        assert_close(loss, whole, n_operations=B * T * V)
        # The whole table is W down^T, so its gradient reaches `down` through W.
        assert_close(gradient, d_whole.T @ weight[:, :3], n_operations=B * T * V)
    narrow = token_nll(hidden, Head(weight[:, :3], bias, 0.0, V, down), targets)
    whole = token_nll(hidden, Head(weight[:, :3] @ down.T, bias, 0.0, V), targets)
    assert_close(narrow, whole, n_operations=D * V)


def test_the_gradient_of_the_token_weights_is_the_loss_of_each_token():
    hidden, weight, bias, targets, token_weight = inputs()
    gradient = jax.grad(lambda w: cross_entropy(
        hidden, Head(weight, bias, 0.0, V), targets, w, backend="chunked")[0])(token_weight)
    assert_close(gradient, token_nll(hidden, Head(weight, bias, 0.0, V), targets), n_operations=V)


def test_the_word_vocabulary_of_wikitext_trains_without_its_logits_in_memory():
    tokens, vocabulary, width = (4, 1024), 267_776, 128

    def loss(hidden, table, targets):
        return cross_entropy(hidden, Head(table, vocab_size=267_735), targets,
                             jnp.ones(tokens), z_weight=1e-4, backend="chunked")[0]

    shapes = (jax.ShapeDtypeStruct((*tokens, width), jnp.float32),
              jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
              jax.ShapeDtypeStruct(tokens, jnp.int32))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*shapes).compile()
    logits = 4 * vocabulary * tokens[0] * tokens[1]
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 2


# Runs below, in a process with eight virtual devices; prints the largest relative errors.
EIGHT = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hippocampus.ops import cross_entropy as module
from hippocampus.ops import logit_ratios
from hippocampus.ops.cross_entropy import Head, cross_entropy

module._CHUNK_LOGITS = 64
rng = np.random.default_rng(0)
hidden, table = rng.normal(size=(8, 12, 8)), rng.normal(size=(16, 8))
hidden, table = hidden.astype(np.float32), table.astype(np.float32)
targets, weight = rng.integers(0, 13, (8, 12)), rng.random((8, 12)).astype(np.float32)

def loss(hidden, table, targets, weight):
    return cross_entropy(hidden, Head(table, vocab_size=13), targets, weight, smoothing=0.1,
                         z_weight=0.01, backend="chunked")

run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
one = run(hidden, table, targets, weight)
errors = {}
for sizes in ((8, 1, 1, 1), (2, 2, 2, 1), (2, 1, 1, 4), (1, 2, 2, 2)):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor", "sequence"),
                         axis_types=(AxisType.Auto,) * 4)
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, P(*axes)))
    rows = ("data", "fsdp")
    with jax.set_mesh(mesh):
        many = run(put(hidden, rows, "sequence"), put(table, "tensor", "fsdp"),
                   put(targets, rows, "sequence"), put(weight, rows, "sequence"))
    errors[str(sizes)] = max(jax.tree.leaves(jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(b).max()),
        many, one)))
print(json.dumps(errors))
"""


def test_tokens_and_table_spread_over_devices_give_the_same_loss_and_gradients():
    environment = {**tiny_run.environment(),
                   "XLA_FLAGS": " ".join(
                       ("--xla_force_host_platform_device_count=8", *quick_xla.FLAGS))}
    done = subprocess.run([sys.executable, "-c", EIGHT], capture_output=True, text=True,
                          timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 4
    assert max(errors.values()) < 1e-5, errors
