"""MoRHopfield: K steps of associative retrieval, and a gate per token over how deep to go.

    xi^0 = q,   xi^j = (1 - alpha) xi^{j-1} + alpha softmax(beta xi^{j-1} K^T) K,   j = 1..K
    y    = (sum_j g_j xi^j) W_o,   g = softmax(u W_g) over the depths, per token

Queries and keys are normalised per head; beta is learned per head. Patterns K are the causal
context (keys s <= t of the document), learned slots, or both. The readout is linear in the
retrieved keys (the paper's W_K W_V, with W_V folded into W_o), so that each step descends an
energy and a decoder caches keys only. One step of alpha = 1 over the context is attention with
keys as values. "Mixture of recursions" names the depth gate: it saves no compute in training.

Source: Ramsauer et al. 2020 (arXiv:2008.02217); Bae et al. 2025 (arXiv:2507.10524) for depth
chosen per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int

from hippocampus.config import HopfieldConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.norms import rms_normalize, unit_normalize
from hippocampus.layers.temporal_layer import TemporalLayer
from hippocampus.ops import hopfield, key_cache
from hippocampus.ops.rotary import rotate

_LOG_BETA = 9.0
"""Largest magnitude of log beta. At e^9 a retrieval has long been a choice of one pattern, at e^-9
an even mean, and products with a state fit every compute dtype, float16 too."""


@struct.dataclass
class HopfieldCache:
    """Keys of the last C tokens of each row, in a ring; None where there are only slots."""

    key_BHCd: Float[Array, "B H C d"] | None


class MoRHopfield(TemporalLayer):
    """The associative-memory path; see the module's docstring for the maths."""

    config: HopfieldConfig
    n_heads: int
    depth: int
    rope_theta: float = 10_000.0
    backend: str = "xla"
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    def __call__(
        self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"], stop_after: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Retrieves for every token of a sequence.

        Args:
          u_BTD: normalised inputs.
          document_ids_BT: document of each token; None = one a row.
          positions_BT: position of each token in its document (used with `rope`).
          stop_after: k steps are made instead of K: depth j < K reads xi^min(j, k) and depth K
            reads xi^k. 0 = K, with the same bits as None. `out` keeps to the K steps.

        Returns:
          y_BTD, and `out`: "query", "key" and "step1".."stepK" (B,T,H,d), "depth_gates" (B,T,K),
          "heads" (B,T,H,d: the steps mixed by those gates, before W_o),
          "energy" (K+1,B,T,H: of the query and after each step), "effective_patterns" and
          "n_patterns" (B,T,H: how many patterns the last step mixed, and could), "entropy" (B,T,H:
          of its weights, nats), "regime" (B,T,H: 0 single, 1 metastable, 2 global), "beta" (H),
          and "out".
        """
        y_BTD, out, _ = self._run(u_BTD, positions_BT, document_ids_BT=document_ids_BT,
                                  stop_after=stop_after)
        return y_BTD, out

    def init_cache(self, batch: int, max_length: int, d_model: int) -> HopfieldCache:
        """The cache before the first token.

        Args:
          batch: rows.
          max_length: tokens that are kept; beyond them a token retrieves from the last
            `max_length`, itself included.
          d_model: width D.
        """
        if self.config.patterns == "slots":
            return HopfieldCache(None)
        shape = (batch, self.n_heads, max_length, d_model // self.n_heads)
        return HopfieldCache(jnp.zeros(shape, self.dtype))

    @nn.compact
    def _run(self, u_BTD: Array, positions_BT: Array, *, document_ids_BT: Array | None = None,
             cache: Any = None, valid_BT: Any = None, stop_after: Array | None = None,
             ) -> tuple[Array, dict[str, Array], Any]:
        (B, T, D), H, cfg = u_BTD.shape, self.n_heads, self.config
        d = D // H
        unit = cfg.normalize == "l2"
        normalize = unit_normalize if unit else rms_normalize

        def project(name: str) -> Array:
            x = nn.Dense(D, use_bias=False, dtype=self.dtype, name=name)(u_BTD)
            x = normalize(x.reshape(B, T, H, d)).astype(self.dtype)
            x = rotate(x, positions_BT, self.rope_theta) if cfg.rope else x
            return self.edit(name, x)

        out = {"query": project("query")}
        keys = slots = None
        if cfg.patterns != "slots":
            keys = out["key"] = project("key")
        if cfg.patterns != "context":
            slots = normalize(self.param("slots", nn.initializers.normal(1.0), (cfg.n_slots, H, d)))
        first_beta = d**0.5 if unit else d**-0.5
        log_beta_H = self.param("log_beta", nn.initializers.constant(jnp.log(first_beta)), (H,))
        out["beta"] = beta_H = inverse_temperature(log_beta_H)

        if cache is None:
            retrieve = functools.partial(
                hopfield.retrieve, keys_BTHd=keys, slots_SHd=slots, beta_H=beta_H,
                alpha=cfg.step_size, document_ids=document_ids_BT, backend=self.backend,
                scaled_BTHd=None if keys is None else hopfield.scaled(keys, beta_H))
        else:
            visible = None
            if keys is not None:
                (at_hand,), visible, written = key_cache.recall(
                    (cache.key_BHCd,), (keys,), positions_BT, valid_BT)
                cache = HopfieldCache(*written)
            patterns, visible = hopfield.patterns_at_hand(
                None if keys is None else at_hand, visible, slots, out["query"])
            retrieve = functools.partial(
                hopfield.retrieve_from, patterns_BHSd=patterns, visible_BnS=visible,
                beta_H=beta_H, alpha=cfg.step_size)

        xi, states = out["query"], []
        for j in range(1, self.depth + 1):
            xi = retrieve(xi)
            out[f"step{j}"] = xi = self.edit(f"step{j}", xi)
            states.append(xi)
        gates_BTK = nn.Dense(self.depth, dtype=self.dtype, kernel_init=nn.initializers.zeros,
                             name="depth_gate")(u_BTD)
        gates_BTK = self.edit("depth_gates", jax.nn.softmax(gates_BTK.astype(jnp.float32), -1))
        out["depth_gates"] = gates_BTK
        read = states if stop_after is None else _stopped(states, retrieve, stop_after)
        mixed = sum(gates_BTK[..., j, None, None] * read[j].astype(jnp.float32)
                    for j in range(self.depth))
        out["heads"] = mixed = self.edit("heads", jnp.asarray(mixed))
        y_BTD = nn.Dense(D, use_bias=False, dtype=self.dtype, name="out")(
            jnp.reshape(mixed, (B, T, D)).astype(self.dtype))
        out["out"] = y_BTD = self.edit("out", y_BTD)
        if cache is None:
            out.update(self._diagnostics([out["query"], *states], keys, slots, beta_H,
                                         document_ids_BT))
        return y_BTD, out, cache

    def _diagnostics(self, states: list[Array], keys: Array | None, slots: Array | None,
                     beta_H: Array, document_ids_BT: Array | None) -> dict[str, Array]:
        """Costs T^2 memory where it is read, and nothing where it is not."""
        memory = (keys, slots, beta_H, document_ids_BT)
        before_last = states[-2]
        effective, n_patterns = hopfield.effective_patterns(before_last, *memory)
        return {"energy": jnp.stack([hopfield.energy(xi, *memory) for xi in states]),
                "effective_patterns": effective, "n_patterns": n_patterns,
                "entropy": hopfield.entropy(before_last, *memory),
                "regime": hopfield.regime(effective, n_patterns)}


def _stopped(states: list[Array], retrieve: Callable[[Array], Array],
             stop_after: Array) -> list[Array]:
    """What each depth reads of a retrieval of k steps, given the K states of the trained one."""
    K = len(states)

    def stopped() -> list[Array]:
        read = states[:1]
        for j, xi in enumerate(states[1:], start=2):
            read.append(jnp.where(j <= stop_after, xi, read[-1]))
        further = jax.lax.fori_loop(0, jnp.maximum(stop_after - K, 0), lambda _, xi: retrieve(xi),
                                    read[-1])
        return [*read[:-1], further]

    return jax.lax.cond(stop_after > 0, stopped, lambda: states)


def inverse_temperature(log_beta_H: Float[Array, " H"]) -> Float[Array, " H"]:
    """beta of each head from its parameter; bounded, because 0 and infinity retrieve NaN."""
    return jnp.exp(jnp.clip(log_beta_H, -_LOG_BETA, _LOG_BETA))
