"""MemoryBank: a persistent memory that hidden states are read with, and written into.

    q  = unit(W_q norm(h)),    r = recall(q; slots, beta, K)                  (ops.memory_read)
    h' = h + tanh(a) W_o r,    a = 0 at first: a fresh memory changes no bit of h
    k  = unit(W_k norm(h)),    v = rms(W_v norm(h))     of the tokens that are chosen
                                                        (ops.memory_select, ops.memory_write)

With `values="next_token"` a slot answers "what came after this?": its key is of the state in front
of the chosen token, and its value of the token's embedding e. What is added follows the size of h:

    k  = unit(W_k norm(h before)),    v = rms(W_v e)
    h' = h + tanh(a) rms(h) W_o r,    W_q = W_k and W_o = W_v^T, orthogonal, at first

so that a memory leans towards what followed alike states from the first step on: a kNN language
model whose distances and mixture are learned. The first token of a chunk has no state in front of
it and is not written.

The slots are state, not parameters: a `MemoryState` goes in and comes out, and belongs to the users
of its rows. A chunk is read before it is written, so that a token finds what earlier chunks left
and nothing of its own; what is written is h, not h', so that the memory keeps no echo of itself.
`unit` and `rms` are per head. The memory is float32 whatever the hidden states are.

Source: retrieval, Ramsauer et al. 2020 (arXiv:2008.02217); the closed gate, Alayrac et al. 2022
(arXiv:2204.14198), 2.3; pairs of a state and its next token, Khandelwal et al. 2020
(arXiv:1911.00172), section 2; the rules of writing in `ops.memory_write`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float32, Int

from hippocampus.config_memory import MemoryConfig, check_memory
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.mor_hopfield import inverse_temperature
from hippocampus.layers.norms import RMSNorm, rms_normalize, unit_normalize
from hippocampus.ops.memory_read import recall
from hippocampus.ops.memory_select import choose
from hippocampus.ops.memory_state import MemoryState, choose_users, empty_state
from hippocampus.ops.memory_write import Entries, write

MODES = ("read+write", "read_only", "write_only", "frozen")
"""What a call does. `read_only` still counts how much each slot is read (`usage_BS`); `frozen`
reads and leaves every bit of the memory. An array names them by their places here."""


class MemoryBank(nn.Module):
    """The memory of one layer; see the module's docstring for the maths.

    Attributes:
      config: its settings.
      d_model: width D of the hidden states.
      norm_epsilon: added to the mean square in the norm of h.
      dtype: of the four matrix products; the memory itself is float32.
      edit: of "query", "read" and "out".
    """

    config: MemoryConfig
    d_model: int
    norm_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    def setup(self) -> None:
        """Parameters of all methods."""
        cfg = self.config
        check_memory(cfg, self.d_model)
        self.width = cfg.width or self.d_model
        H, d = cfg.n_heads, self.width // cfg.n_heads
        self.heads = (H, d)

        def dense(width: int, place: int, transposed: bool = False) -> nn.Dense:
            first: Any = nn.initializers.lecun_normal()
            if self.next_token:
                first = _same_start(place, transposed)
            return nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=first)

        self.next_token = cfg.values == "next_token"
        self.norm = RMSNorm(self.norm_epsilon, dtype=self.dtype)
        self.query, self.key = dense(self.width, 0), dense(self.width, 0)
        self.value, self.out = dense(self.width, 1), dense(self.d_model, 1, transposed=True)
        first_beta = cfg.beta or d**0.5
        self.log_beta = self.param("log_beta", nn.initializers.constant(jnp.log(first_beta)), (H,))
        self.read_gate = self.param("read_gate", nn.initializers.zeros, ())
        if cfg.strategy == "gated":
            self.erase = nn.Dense(self.width, dtype=self.dtype)
            self.write_gate = nn.Dense(1, dtype=self.dtype)
        if cfg.initial == "learned":
            shape, draw = (cfg.n_slots, H, d), nn.initializers.normal(1.0)
            self.prior_keys = self.param("prior_keys", draw, shape)
            self.prior_values = self.param("prior_values", draw, shape)

    def __call__(
        self, hidden_BTD: Float[Array, "B T D"], state: MemoryState | None = None,
        mask_BT: Bool[Array, "B T"] | None = None, *, mode: str | Int[Array, "*B"] = MODES[0],
        surprise_BT: Float[Array, "B T"] | None = None,
        tokens_BT: Int[Array, "B T"] | None = None,
        embedded_BTD: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], MemoryState]:
        """Reads a chunk, then writes it.

        Args:
          hidden_BTD: hidden states.
          state: the memories of the B users of the rows; None = new ones.
          mask_BT: False for padding, which neither reads nor is written; None = no padding.
          mode: one of `MODES`; or its place among them, one for all rows or one a row, which may
            be traced.
          surprise_BT, tokens_BT, embedded_BTD: as for `write`.

        Returns:
          h' in the dtype of `hidden_BTD`, `out` of `read` (of no use where a row does not read),
          and the memories afterwards.

        Raises:
          ValueError: an unknown mode, or memories of another size or number of users.
        """
        B = hidden_BTD.shape[0]
        state = self.init_state(B) if state is None else state
        if isinstance(mode, str):
            if mode not in MODES:
                raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
            code = MODES.index(mode)
            reads, counts, writes = code != 2, code < 2, code in (0, 2)
            given = True
        else:
            code_B = jnp.broadcast_to(jnp.asarray(mode), (B,))
            reads_B, counts_B, writes_B = code_B != 2, code_B < 2, (code_B == 0) | (code_B == 2)
            reads = counts = writes = True
            given = False
        reads, writes = reads or self.is_initializing(), writes or self.is_initializing()

        out: dict[str, Array] = {}
        read_BTD, new = hidden_BTD, state
        if reads:
            read_BTD, out, usage_BS = self.read(hidden_BTD, state, mask_BT)
            if counts:
                new = state.replace(usage_BS=state.usage_BS + usage_BS)
        if not given:
            read_BTD = jnp.where(reads_B[:, None, None], read_BTD, hidden_BTD)
            new = choose_users(counts_B, new, state)
        if writes:
            written = self.write(hidden_BTD, new, mask_BT, surprise_BT=surprise_BT,
                                 tokens_BT=tokens_BT, embedded_BTD=embedded_BTD)
            new = written if given else choose_users(writes_B, written, new)
        return read_BTD, out, new

    def read(
        self, hidden_BTD: Float[Array, "B T D"], state: MemoryState,
        mask_BT: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], Float32[Array, "B S"]]:
        """Adds to every token what its user's memory says to it.

        Args:
          hidden_BTD: hidden states.
          state: the memories, which stay as they are.
          mask_BT: tokens that read; the others keep every bit.

        Returns:
          h' in the dtype of `hidden_BTD`; `out`: "query" (B,T,H,d), "step1".."stepK", "weights"
          (B,T,H,S: of the last step), "energy" (K+1,B,T,H: of the query and after each step; it
          never rises), "read" (B,T,H,d), "beta" (H), "gate" (tanh a) and "out" (B,T,D: what is
          added); and the weight that the reads put on each slot, a mean over heads, which adds to
          `usage_BS`.

        Raises:
          ValueError: memories of another size or number of users.
        """
        self._check(len(hidden_BTD), state)
        B, T, _ = hidden_BTD.shape
        out = {"query": self.edit("query", self._unit(self.query(self.norm(hidden_BTD))))}
        out["beta"] = beta_H = inverse_temperature(self.log_beta)
        found = recall(out["query"], state.keys_BSHd, state.values_BSHd, state.valid_BS, beta_H,
                       steps=self.config.steps, alpha=self.config.step_size)
        out.update({f"step{j}": xi for j, xi in enumerate(found.states_KBTHd, start=1)})
        out["weights"], out["energy"] = found.weights_BTHS, found.energy_jBTH
        out["read"] = read = self.edit("read", found.value_BTHd)
        out["gate"] = gate = jnp.tanh(self.read_gate.astype(jnp.float32))
        added = self.out(read.reshape(B, T, self.width).astype(self.dtype))
        if self.next_token:
            added = added * _root_mean_square(hidden_BTD).astype(self.dtype)
        out["out"] = added = self.edit("out", (gate * added).astype(hidden_BTD.dtype))
        new_BTD, weights = hidden_BTD + added, found.weights_BTHS
        if mask_BT is not None:
            new_BTD = jnp.where(mask_BT[..., None], new_BTD, hidden_BTD)
            weights = jnp.where(mask_BT[..., None, None], weights, 0.0)
        return new_BTD, out, jax.lax.stop_gradient(weights.sum(1).mean(1))

    def write(
        self, hidden_BTD: Float[Array, "B T D"], state: MemoryState,
        mask_BT: Bool[Array, "B T"] | None = None, *,
        surprise_BT: Float[Array, "B T"] | None = None,
        tokens_BT: Int[Array, "B T"] | None = None,
        embedded_BTD: Float[Array, "B T D"] | None = None,
    ) -> MemoryState:
        """Writes what is chosen of a chunk.

        Args:
          hidden_BTD: hidden states.
          state: the memories before.
          mask_BT: False for padding; None = no padding.
          surprise_BT: -log p of each token; needed with `select="surprise"`.
          tokens_BT: ids, from which a slot remembers its source; None = it remembers none.
          embedded_BTD: embeddings of the tokens; needed with `values="next_token"`.

        Returns:
          The memories after. Gradients reach the keys and values that were written; what cuts them
          between windows of training is the caller's `stop_gradient`.

        Raises:
          ValueError: memories of another size or number of users, no surprise, or no embeddings.
        """
        self._check(len(hidden_BTD), state)
        cfg = self.config
        mask_BT = jnp.ones(hidden_BTD.shape[:2], bool) if mask_BT is None else mask_BT
        offered_BT, pairs_BTD = mask_BT, hidden_BTD
        if self.next_token:
            if embedded_BTD is None:
                raise ValueError("values=next_token needs embedded_BTD")
            offered_BT = mask_BT & _behind(mask_BT)
            pairs_BTD = jnp.concatenate(
                (_behind(hidden_BTD), embedded_BTD.astype(hidden_BTD.dtype)), axis=-1)
        chosen = choose(
            pairs_BTD, offered_BT, how=cfg.select, n_writes=cfg.n_writes,
            source_tokens=cfg.source_tokens, surprise_BT=surprise_BT, tokens_BT=tokens_BT)
        u_BmD = self.norm(chosen.hidden_BmD[..., :self.d_model])
        valued_BmD = chosen.hidden_BmD[..., self.d_model:] if self.next_token else u_BmD
        left_out_B1 = (mask_BT & ~offered_BT).sum(-1, keepdims=True, dtype=jnp.int32)
        entries = Entries(
            key_BmHd=self._unit(self.key(u_BmD)), value_BmHd=rms_normalize(
                self._split(self.value(valued_BmD))),
            active_Bm=chosen.active_Bm, source_Bmn=chosen.source_Bmn,
            position_Bm=state.tokens_B[:, None] + left_out_B1 + chosen.rank_Bm)
        if cfg.strategy == "gated":
            gate = jax.nn.sigmoid(self.write_gate(u_BmD).astype(jnp.float32))
            erase = jax.nn.sigmoid(self._split(self.erase(u_BmD)).astype(jnp.float32))
            entries = entries._replace(erase_BmHd=erase, gate_Bm=gate[..., 0])
        new = write(state, entries, cfg.strategy, beta_H=inverse_temperature(self.log_beta),
                    similarity=cfg.similarity, eta=cfg.eta, decay=cfg.decay)
        return new.replace(tokens_B=state.tokens_B + mask_BT.sum(-1, dtype=jnp.int32))

    def init_state(self, batch_size: int) -> MemoryState:
        """The memories of new users, all alike (`initial` says how).

        Args:
          batch_size: B.
        """
        cfg = self.config
        state = empty_state(batch_size, cfg.n_slots, *self.heads, cfg.source_tokens)
        if cfg.initial == "empty":
            return state
        if cfg.initial == "random":
            drawn = jax.random.normal(jax.random.key(0), (cfg.n_slots, *self.heads))
            keys, values = unit_normalize(drawn), jnp.zeros_like(drawn)
        else:
            keys, values = unit_normalize(self.prior_keys), rms_normalize(self.prior_values)
        shape = (batch_size, *keys.shape)
        return state.replace(keys_BSHd=jnp.broadcast_to(keys, shape),
                             values_BSHd=jnp.broadcast_to(values, shape),
                             valid_BS=jnp.ones_like(state.valid_BS))

    def reset(self, state: MemoryState, rows_B: Bool[Array, " B"]) -> MemoryState:
        """The memories, with those of the marked rows as new; the others keep every bit.

        Raises:
          ValueError: memories of another size or number of users.
        """
        self._check(rows_B.shape[0], state)
        return choose_users(rows_B, self.init_state(rows_B.shape[0]), state)

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], *self.heads)

    def _unit(self, x: Array) -> Array:
        return unit_normalize(self._split(x))

    def _check(self, rows: int, state: MemoryState) -> None:
        """A wrong number of rows must not broadcast: it would share a memory."""
        wanted = (rows, self.config.n_slots, *self.heads)
        if state.keys_BSHd.shape != wanted:
            raise ValueError(f"the memory has users, slots, heads, width = {state.keys_BSHd.shape};"
                             f" this layer and batch need {wanted}")


def _behind(array_BT: Array) -> Array:
    """At every token what was at the one before it, and zeros at the first."""
    return jnp.pad(array_BT, ((0, 0), (1, 0), *((0, 0),) * (array_BT.ndim - 2)))[:, :-1]


def _root_mean_square(x: Array) -> Array:
    """Over the last axis, as a constant, in float32."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    return jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))


def _same_start(place: int, transposed: bool) -> Callable[..., Array]:
    """An orthogonal matrix, or its transpose, which is the same for all that ask for a place."""
    def first(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **_: Any) -> Array:
        drawn = nn.initializers.orthogonal()(
            jax.random.key(place), shape[::-1] if transposed else shape, dtype)
        return drawn.T if transposed else drawn

    return first
