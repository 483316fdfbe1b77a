"""A formula in float64, and how far from it something is."""

import jax
import jax.numpy as jnp
import numpy as np


def in_float64(function, *arrays):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)
        return jax.tree.map(np.asarray, function(*wide))


def distance(found, wanted):
    """|found - wanted| / |wanted|."""
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)
