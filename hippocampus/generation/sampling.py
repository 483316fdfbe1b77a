"""Choosing the next token. All settings are traced: changing them compiles nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class SamplerSettings(NamedTuple):
    """How a token is drawn.

    Attributes:
      temperature: divides the logits; 0 = always the most likely token.
      top_k: keep the k most likely tokens; 0 = all.
      top_p: of those, keep the fewest whose probability reaches p; 1 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def choose_token(logits_V: Float[Array, " V"], key: Array,
                 settings: SamplerSettings) -> Int[Array, ""]:
    """Draws one token: temperature, then top-k, then top-p.

    Source: Holtzman et al. 2020 (arXiv:1904.09751), section 3.1, for top-p.
    """
    temperature, top_k, top_p = settings
    scaled = logits_V / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(-scaled)
    ranked = scaled[order]
    rank = jnp.arange(ranked.shape[0])
    ranked = jnp.where((top_k == 0) | (rank < top_k), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    ranked = jnp.where((before < top_p) | (rank == 0), ranked, -jnp.inf)
    drawn = order[jax.random.categorical(key, ranked)]
    return jnp.where(temperature > 0, drawn, order[0])


@functools.partial(jax.jit, static_argnums=0)
def _next_token(model: Any, params: Any, window_T: Array, length: Array, key: Array,
                settings: SamplerSettings) -> Array:
    logits, _ = model.apply({"params": params}, window_T[None])
    return choose_token(logits[0, length - 1], key, settings)


def sample_tokens(model: Any, params: Any, prompt: Int[np.ndarray, " N"], *, context: int,
                  max_new_tokens: int, settings: SamplerSettings, seed: int) -> Iterator[int]:
    """Yields new tokens one by one, each from a full forward pass over the last `context` ids.

    Args:
      model: an unbound model.
      params: its parameters.
      prompt: at least one id.
      context: length of the window; text beyond it is forgotten.
      max_new_tokens: how many tokens to yield.
      settings: of the sampler.
      seed: of the draws.
    """
    ids, key = list(prompt), jax.random.key(seed)
    for step in range(max_new_tokens):
        seen = ids[-context:]
        # Padding stands behind the text, where a causal model cannot see it.
        window = np.zeros(context, np.int32)
        window[:len(seen)] = seen
        token = int(_next_token(model, params, window, np.int32(len(seen)),
                                jax.random.fold_in(key, step), settings))
        ids.append(token)
        yield token
