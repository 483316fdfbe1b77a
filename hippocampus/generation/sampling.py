"""Choosing the next token. All settings are traced: changing them compiles nothing.

Filters look for a threshold by bisection over the order of the numbers themselves, so nothing is
sorted; what no row asks for is not computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

_EXTREME = 1e15
"""Temperatures and penalties beyond it, or below its inverse, act as it does: further out, float32
would overflow, and no token is any more or less likely."""


class SamplerSettings(NamedTuple):
    """How a token is drawn; every field is one number, or one for each row.

    Attributes:
      temperature: divides the logits; 0 = always the most likely token.
      top_k: keep the k most likely tokens, and those as likely as the k-th; 0 = all.
      top_p: of those, keep the fewest of the most likely whose probability reaches p; 1 = all.
      min_p: of those, keep the tokens at least p times as likely as the most likely; 0 = all.
      repetition_penalty: logits of tokens that the row has had are divided by it where they are
        positive and multiplied where they are negative; 1 = none.
    """

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0


def choose_tokens(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], keys_B: PRNGKeyArray,
    settings: SamplerSettings,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws one token for every row.

    Args:
      logits_BV: float32; ids with -inf are never drawn.
      seen_BV: ids that a row has had, prompt included.
      keys_B: a row's draw depends on its own key alone.
      settings: of the sampler.

    Returns:
      tokens_B, and the log-probability that the model itself gave each: of `logits_BV`, before
      penalty, temperature and filters.
    """
    settings = _per_row(settings, len(logits_BV))
    penalized_BV = _penalized(logits_BV, seen_BV, settings)
    drawn_B = settings.temperature > 0

    def draw() -> Array:
        kept_BV = _filtered(penalized_BV, settings)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, kept_BV)
        return jnp.where(drawn_B, tokens_B, jnp.argmax(penalized_BV, axis=-1))

    tokens_B = jax.lax.cond(drawn_B.any(), draw, lambda: jnp.argmax(penalized_BV, axis=-1))
    log_p_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0] - (
        jax.nn.logsumexp(logits_BV, axis=-1))
    return tokens_B.astype(jnp.int32), log_p_B


def process_logits(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], settings: SamplerSettings,
) -> Float[Array, "B V"]:
    """The logits that a token is drawn from: penalty, temperature, top-k, top-p, then min-p.

    Args:
      logits_BV, seen_BV, settings: as for `choose_tokens`. Rows of temperature 0 keep theirs.

    Returns:
      Logits with -inf for what is left out; neutral settings give the very bits that came in.

    Source: Keskar et al. 2019 (arXiv:1909.05858), section 4.1, for the penalty; Fan et al. 2018
    (arXiv:1805.04833) for top-k; Holtzman et al. 2020 (arXiv:1904.09751) for top-p; Nguyen et al.
    2024 (arXiv:2407.01082) for min-p. Order and ties as in transformers' logits processors.
    """
    settings = _per_row(settings, len(logits_BV))
    return _filtered(_penalized(logits_BV, seen_BV, settings), settings)


def _per_row(settings: SamplerSettings, B: int) -> SamplerSettings:
    def rows(value: Any, dtype: Any = jnp.float32) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), (B,))

    return SamplerSettings(rows(settings.temperature), rows(settings.top_k, jnp.int32),
                           *map(rows, settings[2:]))


def _penalized(logits_BV: Array, seen_BV: Array, settings: SamplerSettings) -> Array:
    penalty_B1 = jnp.clip(settings.repetition_penalty, 1 / _EXTREME, _EXTREME)[:, None]
    changed_BV = jnp.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return jnp.where(seen_BV, changed_BV, logits_BV)


def _filtered(logits_BV: Array, settings: SamplerSettings) -> Array:
    divisor_B = jnp.clip(settings.temperature, 1 / _EXTREME, _EXTREME)
    logits_BV = logits_BV / jnp.where(settings.temperature > 0, divisor_B, 1.0)[:, None]
    V = logits_BV.shape[1]
    for wanted_B, keep in (
        ((settings.top_k > 0) & (settings.top_k < V), _top_k), (settings.top_p < 1, _top_p),
        (settings.min_p > 0, _min_p),
    ):
        logits_BV = _where_wanted(wanted_B, functools.partial(keep, settings=settings), logits_BV)
    return logits_BV


def _where_wanted(wanted_B: Array, threshold: Callable[[Array], Array], logits_BV: Array) -> Array:
    """Leaves out what is below a row's threshold, in the rows that want it."""
    def cut(logits_BV: Array) -> Array:
        low_BV = logits_BV < threshold(logits_BV)[:, None]
        return jnp.where(low_BV & wanted_B[:, None], -jnp.inf, logits_BV)

    return jax.lax.cond(wanted_B.any(), cut, lambda logits_BV: logits_BV, logits_BV)


def _top_k(logits_BV: Array, settings: SamplerSettings) -> Array:
    """The k-th largest number."""
    k_B = jnp.clip(settings.top_k, 1, logits_BV.shape[1])
    return _largest(lambda low_B: (logits_BV >= low_B[:, None]).sum(1) >= k_B, len(logits_BV))


def _top_p(logits_BV: Array, settings: SamplerSettings) -> Array:
    """The largest number such that all from it on have the probability p together."""
    p_BV = jax.nn.softmax(logits_BV, axis=-1)
    # A sum of rounded shares may stay a little below 1, and no set must be asked to reach more.
    wanted_B = jnp.minimum(settings.top_p, p_BV.sum(1) * (1 - 1e-6))

    def reaches(low_B: Array) -> Array:
        return jnp.where(logits_BV >= low_B[:, None], p_BV, 0.0).sum(1) >= wanted_B

    # At least the most likely token stays.
    return jnp.minimum(_largest(reaches, len(logits_BV)), logits_BV.max(1))


def _min_p(logits_BV: Array, settings: SamplerSettings) -> Array:
    return logits_BV.max(1) + jnp.log(settings.min_p)


def _largest(holds: Callable[[Array], Array], B: int) -> Float[Array, " B"]:
    """The largest float32 for which a condition holds that holds for every smaller number too.

    Exact after 32 halvings, because float32 numbers have an order of 32 bits.
    """
    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        # The middle, rounded up without overflow.
        middle_B = (low_B >> 1) + (high_B >> 1) + ((low_B | high_B) & 1)
        good_B = holds(_from_order(middle_B))
        return jnp.where(good_B, middle_B, low_B), jnp.where(good_B, high_B, middle_B - 1)

    infinity = _order(np.float32(np.inf))
    bounds = (jnp.full((B,), -infinity - 1, jnp.int32), jnp.full((B,), infinity, jnp.int32))
    return _from_order(jax.lax.fori_loop(0, 32, halve, bounds)[0])


def _order(x: np.float32) -> int:
    return int(x.view(np.int32))


def _from_order(order: Int[Array, " B"]) -> Float[Array, " B"]:
    """The float32 at a place in the order of all: integers compare as their numbers do."""
    bits = jnp.where(order < 0, order ^ 0x7FFFFFFF, order)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _next_token(model: Any, params: Any, window_T: Array, length: Array, seen_V: Array, key: Array,
                settings: SamplerSettings) -> Array:
    logits_1TV, _ = model.apply({"params": params}, window_T[None])
    token_1, _ = choose_tokens(logits_1TV[:, length - 1], seen_V[None], key[None], settings)
    return token_1[0]


def sample_without_cache(
    model: Any, params: Any, prompt: Int[np.ndarray, " n"], *, context: int, max_new_tokens: int,
    settings: SamplerSettings, seed: int,
) -> Iterator[int]:
    """Yields new tokens, each from a full forward pass: what cached decoding is compared with.

    Args:
      model: an unbound model.
      params: its parameters.
      prompt: at least one id.
      context: length of the window; text beyond it is forgotten.
      max_new_tokens: how many tokens to yield.
      settings: of the sampler.
      seed: of the draws; the n-th has the key `fold_in(key(seed), n)`.
    """
    ids, key = list(prompt), jax.random.key(seed)
    settings = SamplerSettings(*(np.asarray(value) for value in settings))
    seen_V = np.zeros(model.config.vocab_size, bool)
    seen_V[ids] = True
    for step in range(max_new_tokens):
        last = ids[-context:]
        # Padding stands behind the text, where a causal model cannot see it.
        window = np.zeros(context, np.int32)
        window[:len(last)] = last
        token = int(_next_token(model, params, window, np.int32(len(last)), seen_V,
                                jax.random.fold_in(key, step), settings))
        ids.append(token)
        seen_V[token] = True
        yield token
