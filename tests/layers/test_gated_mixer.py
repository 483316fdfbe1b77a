"""The mixer: where gates start, what masks and overrides do, and path dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hippocampus.config import MixerConfig
from hippocampus.layers.gated_mixer import GatedMixer, renormalize
from hippocampus.testing import assert_close, check_batch_invariance, check_causality

pytestmark = pytest.mark.usefixtures("quick_compiles")

B, T, D, P = 3, 5, 8, 3
SHARES = (0.5, 0.3, 0.2)
U = jax.random.normal(jax.random.key(0), (B, T, D))
PATHS = dict(zip("abc", jax.random.normal(jax.random.key(1), (P, B, T, D)), strict=True))
MIXER = GatedMixer(MixerConfig(width=4, temperature=0.7), SHARES, scale_init=0.5)
FIRST = MIXER.init(jax.random.key(2), U, PATHS)["params"]
TRAINED = jax.tree.map(
    lambda a: a + 0.5 * jax.random.normal(jax.random.key(a.size), a.shape), FIRST)


@jax.jit
def mix(paths, control=None, mask=None, override=None, params=TRAINED, u=U):
    return MIXER.apply({"params": params}, u, paths, control, mask, override)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_gates_start_at_the_first_shares():
    _, out = mix(PATHS, params=FIRST)
    assert_close(out["gates"], np.broadcast_to(SHARES, (B, T, P)))
    np.testing.assert_allclose(out["entropy"], -sum(s * np.log(s) for s in SHARES), rtol=1e-5)


def test_gates_sum_to_one_and_are_float32():
    _, out = mix(PATHS)
    assert_close(out["gates"].sum(-1), np.ones((B, T)))
    assert out["gates"].dtype == jnp.float32
    assert np.ptp(out["gates"], axis=(0, 1)).min() > 1e-3  # they differ from token to token


def test_the_result_is_the_gated_sum_of_normalised_paths():
    y, out = mix(PATHS)
    terms = []
    for p, (name, path) in enumerate(PATHS.items()):
        path = np.asarray(path, np.float64)
        normal = path / np.sqrt((path**2).mean(-1, keepdims=True) + 1e-6)
        terms.append(np.asarray(out["gates"])[..., p, None] * normal
                     * TRAINED[f"norm_{name}"]["scale"])
    assert_close(y, sum(terms), n_operations=D)
    assert_close(out["terms"], np.stack(terms, axis=-2), n_operations=D)
    assert_close(out["contribution"], np.stack([np.linalg.norm(t, axis=-1) for t in terms], -1),
                 n_operations=D)


def mix_op_by_op(*arguments):
    """Without the compiler, which rounds differently in different programs."""
    return MIXER.apply({"params": TRAINED}, U, PATHS, *arguments)


def test_arrays_that_change_nothing_give_the_same_bits():
    neutral = mix_op_by_op(jnp.zeros((B, T, P)), jnp.ones(P), -jnp.ones(P))
    assert_same(mix_op_by_op(), neutral)


def test_a_control_of_zero_is_none_and_others_move_the_gates():
    plain, controlled = mix(PATHS), mix(PATHS, jnp.zeros((B, T, P)).at[:, 2, 1].set(3.0))
    assert_same(mix_op_by_op(), mix_op_by_op(jnp.zeros((B, T, P))))
    moved = np.asarray(controlled[1]["gates"] - plain[1]["gates"])
    assert (moved[:, 2, 1] > 0.01).all() and np.abs(moved[:, [0, 1, 3, 4]]).max() < 1e-6


@pytest.mark.parametrize("p", range(P))
def test_a_masked_path_has_no_influence(p):
    mask = jnp.ones(P).at[p].set(0)
    y, out = mix(PATHS, None, mask)
    name = "abc"[p]
    assert_same((y, out), mix({**PATHS, name: PATHS[name] * -7 + 1}, None, mask))
    assert not np.asarray(out["gates"])[..., p].any()
    assert_close(out["gates"].sum(-1), np.ones((B, T)))
    plain = np.asarray(mix(PATHS)[1]["gates"])
    others = [q for q in range(P) if q != p]
    assert_close(out["gates"][..., others],
                 plain[..., others] / plain[..., others].sum(-1, keepdims=True))


def test_a_gate_override_replaces_the_gates_it_names():
    plain = np.asarray(mix(PATHS)[1]["gates"])
    _, out = mix(PATHS, None, None, jnp.asarray([0.9, -1.0, 0.0]))
    gates = np.asarray(out["gates"])
    assert (gates[..., 0] == np.float32(0.9)).all() and (gates[..., 2] == 0).all()
    np.testing.assert_array_equal(gates[..., 1], plain[..., 1])


def test_all_paths_masked_gives_zeros_not_nan():
    y, out = mix(PATHS, None, jnp.zeros(P))
    assert not np.asarray(y).any() and not np.asarray(out["gates"]).any()


def test_renormalize_keeps_the_bits_where_nothing_is_masked():
    gates = mix(PATHS)[1]["gates"]
    mask = jnp.ones((B, 1, P)).at[1, 0, 2].set(0)
    kept = renormalize(gates, mask)
    np.testing.assert_array_equal(kept[0], gates[0])
    assert (kept[1] != gates[1]).any()


def test_path_dropout_drops_the_share_asked_for_and_renormalises():
    wide = 4000
    mixer = GatedMixer(MixerConfig(width=4, path_dropout=0.3), SHARES)
    u = jnp.broadcast_to(U[:1, :2], (wide, 2, D))
    paths = {name: jnp.broadcast_to(path[:1, :2], u.shape) for name, path in PATHS.items()}

    def gates(train):
        return np.asarray(mixer.apply({"params": TRAINED}, u, paths, train=train,
                                      rngs={"dropout": jax.random.key(5)})[1]["gates"])

    drawn, plain = gates(True), gates(False)
    assert_close(drawn.sum(-1), np.ones((wide, 2)))
    off = drawn == 0
    assert (off[:, 0] == off[:, 1]).all()  # a sequence loses a path as a whole
    assert (off[:, 0].sum(-1) <= 1).all()
    share = off[:, 0].mean(0)
    spread = np.sqrt(0.1 * 0.9 / wide)
    assert np.abs(share - 0.1).max() < 4 * spread  # 0.3 over three paths evenly
    whole = ~off[:, 0].any(-1)
    np.testing.assert_array_equal(drawn[whole], plain[whole])
    assert (plain > 0).all()  # never at evaluation


def test_a_single_path_is_never_dropped():
    mixer = GatedMixer(MixerConfig(width=4, path_dropout=0.9), (1.0,))
    one = {"a": PATHS["a"]}
    params = mixer.init(jax.random.key(0), U, one)["params"]
    _, out = mixer.apply({"params": params}, U, one, train=True,
                         rngs={"dropout": jax.random.key(1)})
    assert (np.asarray(out["gates"]) == 1).all()


def test_the_mixer_reads_token_by_token():
    def run(u):
        y, out = mix({"a": u, "b": -u, "c": jnp.flip(u, -1)}, u=u)
        return {"y": y, **out}

    check_causality(run, U)
    check_batch_invariance(run, U)
    flipped = jax.tree.map(lambda a: jnp.flip(a, 1), run(jnp.flip(U, 1)))
    assert_same(flipped, run(U))
