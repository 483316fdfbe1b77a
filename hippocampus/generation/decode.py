"""The decode loop: prompts are read in chunks, then tokens are drawn one after the other.

Both are single programs on the device. Chunks have one of a few sizes and caches one of a few
capacities, so that prompts of any length compile a handful of programs; what the sampler does,
how many tokens are wanted and where a row ends are traced values. A text of unknown length begins
in a small cache and goes on in larger ones (`grow`).

A row is independent of its batch: it has its own position, its own random stream, and ends alone.
The n-th token of a row is drawn with `fold_in(key of the row, n)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.generation.sampling import SamplerSettings, choose_tokens
from hippocampus.ops.memory_state import MemoryState

CHUNKS = (256, 32)
"""Tokens of a prompt that are read at once, largest first."""
TOKENS_PER_CALL = 256
"""Most tokens that one call of `write` draws."""
_SMALLEST_CACHE = 256
_CACHE_GROWTH = 4
_GPU_OPTIONS = {
    "xla_gpu_enable_command_buffer":
        "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL,DYNAMIC_SLICE_FUSION",
    "xla_gpu_graph_min_graph_size": "1"}
"""One token of one row is bound by launches: the whole loop becomes one command buffer."""


@struct.dataclass
class DecodeState:
    """Where every row stands.

    Attributes:
      cache: of the model.
      logits_BV: of each row's next token (float32, over the padded vocabulary).
      seen_BV: ids that a row has had, prompt included.
      done_B: the row draws no more tokens.
      drawn: tokens drawn so far, by every row that is not done.
    """

    cache: Any
    logits_BV: Float[Array, "B V"]
    seen_BV: Bool[Array, "B V"]
    done_B: Bool[Array, " B"]
    drawn: Int[Array, ""]


class Drawn(NamedTuple):
    """What one call of `write` drew: `n` tokens a row, behind which the arrays mean nothing.

    Attributes:
      tokens_BM: ids; -1 where the row was done.
      log_p_BM: log-probabilities that the model gave them, before anything the sampler does.
      n: tokens of the call, at most M.
    """

    tokens_BM: Int[Array, "B M"]
    log_p_BM: Float[Array, "B M"]
    n: Int[Array, ""]


def capacity(length: int, context: int) -> int:
    """Tokens that a cache holds, for rows of this length: one of few sizes, at most the context."""
    size = _SMALLEST_CACHE
    while size < length:
        size *= _CACHE_GROWTH
    return min(size, context)


def start(model: Any, variables: Any, prompts: Sequence[Int[np.ndarray, " n"]], *, max_length: int,
          passes: int | None = None, skip: bool = False,
          memory: MemoryState | None = None) -> DecodeState:
    """Reads the prompts.

    Args:
      model: an unbound model.
      variables: from `decode_variables` of the model.
      prompts: ids; a row without any stands for nothing and is done.
      max_length: tokens that a row looks back to (see `init_cache` of the model).
      passes, skip: reasoning passes, and whether the flow network stands for the last one.
      memory: of the user of each row, for a model that has one; None = new ones.

    Returns:
      The state from which `write` draws the first token.
    """
    longest = max(map(len, prompts))
    state = _empty(model, variables, len(prompts), max_length, passes)
    if memory is not None:  # a copy, because the state is used up
        state = dataclasses.replace(
            state, cache=state.cache.replace(memory=jax.tree.map(jnp.array, memory)))
    return read(model, variables, state, prompts, skip=skip) if longest else state


def grow(model: Any, state: DecodeState, max_length: int, *,
         passes: int | None = None) -> DecodeState:
    """The same rows in caches that hold more tokens; what they hold keeps every bit.

    Args:
      model: an unbound model.
      state: from `start`, `read` or `write`; it is used up.
      max_length: tokens that a row looks back to from now on.
      passes: as for `start`.

    Returns:
      The state as if `start` had been given this `max_length`: keys and values lie at the
      beginning of larger rings (`hippocampus.ops.key_cache`). What has the same size for any
      `max_length`, such as the state of a state-space layer, a full window or a memory, is as it
      was.

    Raises:
      ValueError: a cache would shrink; a row has read more tokens than one that grows could hold,
        so that some are lost; or other passes than those of the state.
    """
    larger = jax.eval_shape(lambda: model.init_cache(len(state.done_B), max_length, passes))
    read = int(state.cache.length_B.max())

    def widen(array: Array, wanted: Any) -> Array:
        more = [(0, new - old) for old, new in zip(array.shape, wanted.shape, strict=True)]
        held = [size for size, (_, n) in zip(array.shape, more, strict=True) if n]
        if any(n < 0 for _, n in more):
            raise ValueError(f"a cache of {max_length} tokens would be smaller than it is")
        if any(read > size for size in held):
            raise ValueError(f"{read} tokens are read and a cache held {min(held)} of them")
        return jnp.pad(array, more) if held else array

    return dataclasses.replace(state, cache=jax.tree.map(widen, state.cache, larger))


def read(model: Any, variables: Any, state: DecodeState,
         texts: Sequence[Int[np.ndarray, " n"]], *, skip: bool = False) -> DecodeState:
    """Reads further tokens of the rows, from where each of them stands.

    Args:
      model: an unbound model.
      variables: from `decode_variables` of the model.
      state: from `start`, `write` or the last call; it is used up.
      texts: ids of each row; a row that gets some is no longer done, one without any stays as it
        is.
      skip: as for `start`.

    Returns:
      The state from which `write` draws the next token.
    """
    lengths = np.array([len(text) for text in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[:len(text)] = text
    for begin, size in _chunks(int(lengths.max())):
        chunk = tokens[:, begin:begin + size]
        chunk = np.pad(chunk, ((0, 0), (0, size - chunk.shape[1])))
        valid = begin + np.arange(size) < lengths[:, None]
        state = _read(model, variables, state, chunk, valid, skip=skip)
    return state


def write(model: Any, variables: Any, state: DecodeState, seeds_B: Int[np.ndarray, " B"],
          settings: SamplerSettings, limit: int, end_ids: Sequence[int] = (), *,
          skip: bool = False) -> tuple[DecodeState, Drawn]:
    """Draws the next tokens, until so many are drawn or every row is done.

    Args:
      model: an unbound model.
      variables: from `decode_variables` of the model.
      state: from `start` or the last call; it is used up.
      seeds_B: of each row's draws.
      settings: of the sampler, for all rows or one each.
      limit: most tokens to draw in this call; never more than `TOKENS_PER_CALL`.
      end_ids: the ids that end a row.
      skip: as for `start`.

    Returns:
      The state after them, and the tokens.
    """
    # With one dtype each, so that no kind of number compiles the program again.
    arrays: dict[str, Any] = {
        name: np.asarray(value, np.int32 if name == "top_k" else np.float32)
        for name, value in settings._asdict().items()}
    return _compiled_write(_platform(variables))(
        model, variables, state, np.asarray(seeds_B, np.uint32), SamplerSettings(**arrays),
        np.int32(limit), np.array(list(end_ids) or [-1], np.int32), skip=skip)


@functools.partial(jax.jit, donate_argnums=0)
def stop_rows(state: DecodeState, rows_B: Bool[Array, " B"]) -> DecodeState:
    """The state with more rows done; the one given is used up."""
    return dataclasses.replace(state, done_B=state.done_B | rows_B)


def known_options(options: Mapping[str, str]) -> dict[str, str]:
    """The compiler's options, or none of them where it does not know one."""
    try:
        jax.jit(lambda x: x + 1, compiler_options=dict(options)).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return dict(options)


@functools.cache
def _compiled_write(platform: str) -> Any:
    """`_write`, compiled as is best for a platform."""
    options = known_options(_GPU_OPTIONS) if platform == "gpu" else None
    return jax.jit(_write, static_argnums=0, static_argnames="skip", donate_argnums=2,
                   compiler_options=options or None)


def _platform(variables: Any) -> str:
    leaf = jax.tree.leaves(variables)[0]
    device = next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0]
    return str(device.platform)


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    """(where a chunk begins, its size): as few and as little padding as the sizes allow."""
    begin = 0
    while begin < length:
        left = length - begin
        size = next((size for size in CHUNKS if size <= left), CHUNKS[-1])
        yield begin, size
        begin += size


@functools.partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _empty(model: Any, variables: Any, batch: int, max_length: int,
           passes: int | None) -> DecodeState:
    V = model.head(variables["params"]).weight_VD.shape[0]
    cache = model.init_cache(batch, max_length, passes)
    if hasattr(model, "new_memory"):  # which parameters may have a part in
        cache = cache.replace(memory=model.new_memory(variables["params"], batch))
    return DecodeState(
        cache=cache, logits_BV=jnp.zeros((batch, V)),
        seen_BV=jnp.zeros((batch, V), bool), done_B=jnp.ones((batch,), bool), drawn=jnp.int32(0))


@functools.partial(jax.jit, static_argnums=0, static_argnames="skip", donate_argnums=2)
def _read(model: Any, variables: Any, state: DecodeState, tokens_Bn: Array, valid_Bn: Array, *,
          skip: bool) -> DecodeState:
    hidden_BnD, cache = model.apply(variables, tokens_Bn, state.cache, valid_Bn,
                                    skip=skip, method="extend")
    n_valid_B = valid_Bn.sum(1)
    last_B1D = jnp.take_along_axis(hidden_BnD, jnp.maximum(n_valid_B - 1, 0)[:, None, None], 1)
    logits_BV = model.head(variables["params"]).logits(last_B1D[:, 0])
    some_B = n_valid_B > 0
    rows_B1 = jnp.arange(len(tokens_Bn))[:, None]
    outside = state.seen_BV.shape[1]
    return dataclasses.replace(
        state, cache=cache, logits_BV=jnp.where(some_B[:, None], logits_BV, state.logits_BV),
        seen_BV=state.seen_BV.at[rows_B1, jnp.where(valid_Bn, tokens_Bn, outside)].set(
            True, mode="drop"),
        done_B=state.done_B & ~some_B)


def _write(model: Any, variables: Any, state: DecodeState, seeds_B: Array,
           settings: SamplerSettings, limit: Array, end_ids: Array, *,
           skip: bool) -> tuple[DecodeState, Drawn]:
    B = state.done_B.shape[0]
    keys_B = jax.vmap(jax.random.key)(seeds_B)
    drawn = Drawn(jnp.full((B, TOKENS_PER_CALL), -1, jnp.int32),
                  jnp.zeros((B, TOKENS_PER_CALL)), jnp.int32(0))

    def more(carry: tuple[DecodeState, Drawn]) -> Array:
        state, drawn = carry
        return (drawn.n < jnp.minimum(limit, TOKENS_PER_CALL)) & ~state.done_B.all()

    def step(carry: tuple[DecodeState, Drawn]) -> tuple[DecodeState, Drawn]:
        state, drawn = carry
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, state.drawn)
        tokens_B, log_p_B = choose_tokens(state.logits_BV, state.seen_BV, keys, settings)
        live_B = ~state.done_B
        drawn = Drawn(
            _set_column(drawn.tokens_BM, drawn.n, jnp.where(live_B, tokens_B, -1)),
            _set_column(drawn.log_p_BM, drawn.n, log_p_B), drawn.n + 1)
        done_B = state.done_B | (tokens_B[:, None] == end_ids).any(1)
        hidden_B1D, cache = model.apply(variables, tokens_B[:, None], state.cache,
                                        ~done_B[:, None], skip=skip, method="extend")
        return dataclasses.replace(
            state, cache=cache, logits_BV=model.head(variables["params"]).logits(hidden_B1D[:, 0]),
            done_B=done_B,
            seen_BV=state.seen_BV.at[jnp.arange(B), tokens_B].set(True, unique_indices=True),
            drawn=state.drawn + 1), drawn

    return jax.lax.while_loop(more, step, (state, drawn))


def _set_column(array_BM: Array, at: Array, column_B: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(array_BM, column_B[:, None], at, axis=1)
