"""A small causal cell whose fixed points the solvers are tried on."""

import jax
import jax.numpy as jnp

B, T, D = 2, 8, 6
IDS = jnp.asarray([[1] * 5 + [2] * 3, [1] * 1 + [2] * 4 + [0] * 3])
METHODS = ("picard", "anderson", "broyden")


def weights(size=0.7, leak=0.0):
    """Of a cell that contracts below a size of about 1, and is not bounded with a leak."""
    W = jax.random.normal(jax.random.key(0), (D, D))
    return {"W": size * W / jnp.linalg.norm(W, 2),
            "u": jax.random.normal(jax.random.key(1), (B, T, D)), "leak": jnp.asarray(leak)}


def cell(z_BTD, w, ids_BT=IDS):
    """A token reads a decaying sum of the states of its document up to itself."""
    age = jnp.arange(z_BTD.shape[1])[:, None] - jnp.arange(z_BTD.shape[1])
    mixing = jnp.where((age >= 0) & (ids_BT[:, :, None] == ids_BT[:, None]), 0.5 ** (age + 1), 0)
    past = jnp.einsum("bts,bsd->btd", mixing, z_BTD)
    sums = (0.5 * z_BTD + 0.5 * past) @ w["W"] + w["u"]
    return jnp.tanh(sums) + w["leak"] * sums
