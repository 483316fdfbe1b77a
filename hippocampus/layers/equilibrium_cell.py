"""EquilibriumCell: one sweep over a token's state and its memory query, iterated to a fixed point.

    z  = f(z, xi) = norm( W_x u + sum_p s_p * part_p ),   parts: SSM(a), W_h xi, MLP(a)
                    a = rms(z + W_u u)
    xi = h(xi, z) = (1 - alpha) xi + alpha (retrieve(xi) + kappa q) / (1 + kappa),  q = norm(W_q z)

u is what the layers before read; it does not change. h is a step of gradient descent, of size
alpha / (1 + kappa), on

    E(xi; q) = E_Hopfield(xi; patterns, beta) + kappa/2 |xi - q|^2      (per head, >= 0)

and never raises it for alpha <= 1, at fixed q. Of state and query together there is no energy.
The norm comes last, so that the state is bounded and a large `s` cannot make it run away. Patterns
are learned slots, keys W_k u of the causal context, or both, normalised per head as the query is.

Every order of the two updates has the same fixed points; see `sweep`. A solver sees state and
query as one vector (z, c xi), where c gives both the same size.

Source: Bai et al. 2019 (arXiv:1909.01377) for the fixed point; Ramsauer et al. 2020
(arXiv:2008.02217), lemma A.4, for the retrieval's energy.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config_equilibrium import CellConfig, CellHopfieldConfig
from hippocampus.layers.mlp import MLP
from hippocampus.layers.mor_hopfield import inverse_temperature
from hippocampus.layers.norms import RMSNorm, rms_normalize, unit_normalize
from hippocampus.layers.state_space import state_space
from hippocampus.ops import key_cache
from hippocampus.ops.attention import attention
from hippocampus.ops.pattern_recall import Recalled, energy, recall


class Drive(struct.PyTreeNode):
    """What a solve holds fixed: all that comes from u, and from the tokens read before.

    Attributes:
      base_BTD, mix_BTD: W_x u and W_u u.
      keys_BHCd: patterns from the context; None = slots only.
      visible_BTC: which of them each token sees; None = those up to it in its document.
      document_ids_BT, positions_BT: of each token; no ids = one document a row.
      ssm_cache: what the cell's state-space layer has read before; None = nothing.
      valid_BT: with a cache, which tokens count; the others keep their state.
    """

    base_BTD: Float[Array, "B T D"]
    mix_BTD: Float[Array, "B T D"]
    keys_BHCd: Float[Array, "B H C d"] | None
    visible_BTC: Bool[Array, "B T C"] | None
    document_ids_BT: Int[Array, "B T"] | None
    positions_BT: Int[Array, "B T"]
    ssm_cache: Any = None
    valid_BT: Bool[Array, "B T"] | None = None


class CellCache(struct.PyTreeNode):
    """What a cell remembers of a row: its state-space layer's cache, and keys of the context."""

    ssm: Any
    key_BHCd: Float[Array, "B H C d"] | None


def first_beta(memory: CellHopfieldConfig, d: int) -> float:
    """The inverse temperature at initialisation, for heads of width d.

    Scores of unit size, as in attention. But where a token may see two keys only, h moves a query
    between them by beta / (2 (1 + kappa)) of a change; that is to be at most 1/2.
    """
    beta = d**0.5
    if memory.patterns != "slots":
        beta = min(beta, 1 + memory.anchor)
    return beta if memory.normalize == "l2" else beta / d


class EquilibriumCell(nn.Module):
    """The maps f and h and their sweeps; see the module's docstring for the maths."""

    config: CellConfig
    memory: CellHopfieldConfig
    d_model: int
    n_heads: int
    norm_epsilon: float = 1e-6
    backend: str = "xla"
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Creates the parameters."""
        cfg, memory, D = self.config, self.memory, self.d_model
        dense = functools.partial(nn.Dense, D, use_bias=False, dtype=self.dtype)
        self.inject, self.mix = dense(), dense()
        self.norm_in = RMSNorm(self.norm_epsilon, self.dtype)
        self.norm_state = RMSNorm(self.norm_epsilon)
        self.part_scale = self.param("part_scale", nn.initializers.constant(cfg.gain),
                                     (len(cfg.parts), D))
        if "ssm" in cfg.parts:
            self.ssm = state_space(cfg.ssm, self.n_heads, self.norm_epsilon, dtype=self.dtype)
        if "mlp" in cfg.parts:
            self.mlp = MLP(cfg.mlp, self.dtype)
        if "hopfield" not in cfg.parts:
            return
        H, d = self.n_heads, D // self.n_heads
        self.query, self.recalled = dense(), dense()
        if memory.patterns != "slots":
            self.key = dense()
        if memory.patterns != "context":
            self.slots = self.param("slots", nn.initializers.normal(1.0), (memory.n_slots, H, d))
        self.log_beta = self.param("log_beta", nn.initializers.constant(
            math.log(first_beta(memory, d))), (H,))

    def __call__(self, u_BTD: Float[Array, "B T D"], positions_BT: Int[Array, "B T"],
                 ) -> Float[Array, "B T S"]:
        """One sweep from the first state; makes every parameter.

        Args:
          u_BTD: what the cell is driven by, normalised.
          positions_BT: position of each token in its document.
        """
        drive = self.drive(u_BTD, None, positions_BT)
        return self.sweep(self.first_state(drive), drive)

    # ------------------------------------------------------------ what a solve begins with

    def drive(self, u_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
              positions_BT: Int[Array, "B T"]) -> Drive:
        """All that a solve over a whole sequence holds fixed; arguments as for the layers."""
        keys_BHCd = None
        if self._has_keys:
            keys_BHCd = jnp.moveaxis(self._heads(self.key(u_BTD)).astype(self.dtype), 1, 2)
        return Drive(self.inject(u_BTD), self.mix(u_BTD), keys_BHCd, None, document_ids_BT,
                     positions_BT)

    def drive_on(self, u_BnD: Float[Array, "B n D"], positions_Bn: Int[Array, "B n"],
                 cache: CellCache, valid_Bn: Bool[Array, "B n"]) -> tuple[Drive, CellCache]:
        """The same for further tokens of rows, and the cache with their keys in it.

        The state-space layer's part of the cache waits for their states: see `advance`.
        """
        keys_BHCd = visible = None
        if self._has_keys:
            assert cache.key_BHCd is not None
            new = self._heads(self.key(u_BnD)).astype(self.dtype)
            (keys_BHCd,), visible, (written,) = key_cache.recall(
                (cache.key_BHCd,), (new,), positions_Bn, valid_Bn)
            cache = cache.replace(key_BHCd=written)
        drive = Drive(self.inject(u_BnD), self.mix(u_BnD), keys_BHCd, visible, None, positions_Bn,
                      cache.ssm, valid_Bn)
        return drive, cache

    def first_state(self, drive: Drive) -> Float[Array, "B T S"]:
        """Where a solve begins: what f gives without its parts, and the query there."""
        z_BTD = self.norm_state(drive.base_BTD)
        if not self._has_memory:
            return z_BTD
        return self.join(z_BTD, self.query_of(z_BTD))

    # ------------------------------------------------------------ the two updates

    def update(self, z_BTD: Float[Array, "B T D"], xi_BTHd: Float[Array, "B T H d"] | None,
               drive: Drive) -> Float[Array, "B T D"]:
        """f(z, xi), float32."""
        a_BTD = self.norm_in(z_BTD + drive.mix_BTD)
        total_BTD = drive.base_BTD.astype(jnp.float32)
        for p, part in enumerate(self.config.parts):
            if part == "ssm":
                y_BTD = self._read(a_BTD, drive)[0]
            elif part == "mlp":
                y_BTD = self.mlp(a_BTD)
            else:
                assert xi_BTHd is not None
                unit_BTD = (xi_BTHd * self._size).reshape(z_BTD.shape)
                y_BTD = self.recalled(unit_BTD.astype(self.dtype))
            total_BTD = total_BTD + self.part_scale[p] * y_BTD.astype(jnp.float32)
        return self._kept(self.norm_state(total_BTD), z_BTD, drive)

    def retrieve(self, xi_BTHd: Float[Array, "B T H d"], z_BTD: Float[Array, "B T D"],
                 drive: Drive, *, steps: int = 1, trust_radius: float = 0.0,
                 ) -> Float[Array, "B T H d"]:
        """`steps` times h(xi, z), float32; with a trust radius > 0 no step is longer per head."""
        memory, q_BTHd = self.memory, self.query_of(z_BTD)
        alpha, kappa = memory.step_size, memory.anchor
        look = self._look(drive)

        def step(xi_BTHd: Array) -> Array:
            move = alpha * ((look(xi_BTHd) + kappa * q_BTHd) / (1 + kappa) - xi_BTHd)
            if trust_radius:
                square = (move * move).sum(-1, keepdims=True)
                move = move * jnp.minimum(1.0, trust_radius * jax.lax.rsqrt(
                    jnp.maximum(square, jnp.finfo(jnp.float32).tiny)))
            return self._kept(xi_BTHd + move, xi_BTHd, drive)

        if steps == 1:
            return step(xi_BTHd)
        return jax.lax.fori_loop(0, steps, lambda _, xi: step(xi), xi_BTHd)

    def query_of(self, z_BTD: Float[Array, "B T D"]) -> Float[Array, "B T H d"]:
        """q(z): the query that the state asks with, normalised per head, float32."""
        return self._heads(self.query(z_BTD.astype(self.dtype)))

    # ------------------------------------------------------------ sweeps over both

    def sweep(self, s_BTS: Float[Array, "B T S"], drive: Drive, schedule: str = "simultaneous",
              ) -> Float[Array, "B T S"]:
        """Both updates once; float32.

        Args:
          s_BTS: state and query as one vector (S = 2 D, or D without a memory).
          drive: from `drive`.
          schedule: "simultaneous" (both see the old values, one retrieval step), or "alternating"
            (`hopfield.steps` retrieval steps, then the state sees the new query).
        """
        z_BTD, xi_BTHd = self.split(s_BTS)
        if xi_BTHd is None:
            return self.update(z_BTD, None, drive)
        if schedule == "simultaneous":
            return self.join(self.update(z_BTD, xi_BTHd, drive),
                             self.retrieve(xi_BTHd, z_BTD, drive))
        xi_BTHd = self.retrieve(xi_BTHd, z_BTD, drive, steps=self.memory.steps)
        return self.join(self.update(z_BTD, xi_BTHd, drive), xi_BTHd)

    def state_sweep(self, s_BTS: Float[Array, "B T S"], drive: Drive) -> Float[Array, "B T S"]:
        """f alone; the query stays."""
        z_BTD, xi_BTHd = self.split(s_BTS)
        return self.join(self.update(z_BTD, xi_BTHd, drive), xi_BTHd)

    def query_sweep(self, s_BTS: Float[Array, "B T S"], drive: Drive) -> Float[Array, "B T S"]:
        """h alone, `hopfield.steps` times within the trust radius; the state stays."""
        z_BTD, xi_BTHd = self.split(s_BTS)
        if xi_BTHd is None:
            return s_BTS
        return self.join(z_BTD, self.retrieve(
            xi_BTHd, z_BTD, drive, steps=self.memory.steps,
            trust_radius=self.memory.trust_radius))

    def energies(self, s_BTS: Float[Array, "B T S"], drive: Drive) -> dict[str, Array]:
        """E(xi; q(z)) of each token, a sum over heads (float32), and its two terms by name."""
        z_BTD, xi_BTHd = self.split(s_BTS)
        if xi_BTHd is None:
            zero_BT = jnp.zeros(z_BTD.shape[:2])
            return {"retrieval": zero_BT, "anchor": zero_BT, "total": zero_BT}
        found = self._recall(xi_BTHd, drive)
        retrieval_BT = energy(xi_BTHd, found, self.beta, self._square_norm).sum(-1)
        off = xi_BTHd - self.query_of(z_BTD)
        anchor_BT = 0.5 * self.memory.anchor * (off * off).sum((-1, -2))
        return {"retrieval": retrieval_BT, "anchor": anchor_BT, "total": retrieval_BT + anchor_BT}

    def split(self, s_BTS: Float[Array, "B T S"]) -> tuple[Array, Array | None]:
        """State z_BTD and query xi_BTHd of a solver's vector; without a memory no query."""
        if not self._has_memory:
            return s_BTS, None
        z_BTD, unit_BTD = jnp.split(s_BTS, 2, axis=-1)
        shape = (*z_BTD.shape[:2], self.n_heads, self.d_model // self.n_heads)
        return z_BTD, unit_BTD.reshape(shape) / self._size

    def join(self, z_BTD: Float[Array, "B T D"], xi_BTHd: Float[Array, "B T H d"] | None,
             ) -> Float[Array, "B T S"]:
        """The solver's vector of a state and a query."""
        if xi_BTHd is None:
            return z_BTD
        return jnp.concatenate([z_BTD, (xi_BTHd * self._size).reshape(z_BTD.shape)], axis=-1)

    # ------------------------------------------------------------ reading on

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int) -> CellCache:
        """The cache before the first token; `max_length` keys of the context are kept."""
        cfg, H, D = self.config, self.n_heads, self.d_model
        ssm = keys = None
        if "ssm" in cfg.parts:
            ssm = state_space(cfg.ssm, H, self.norm_epsilon, dtype=self.dtype,
                              parent=None).init_cache(batch, max_length, D)
        if self._has_keys:
            keys = jnp.zeros((batch, H, max_length, D // H), self.dtype)
        return CellCache(ssm, keys)

    def advance(self, z_BnD: Float[Array, "B n D"], drive: Drive) -> Any:
        """The state-space layer's cache after tokens whose states are z."""
        if "ssm" not in self.config.parts:
            return drive.ssm_cache
        return self._read(self.norm_in(z_BnD + drive.mix_BTD), drive)[1]

    # ------------------------------------------------------------ parts

    @property
    def beta(self) -> Float[Array, " H"]:
        """Inverse temperature per head."""
        return inverse_temperature(self.log_beta)

    @property
    def _has_memory(self) -> bool:
        return "hopfield" in self.config.parts

    @property
    def _has_keys(self) -> bool:
        return self._has_memory and self.memory.patterns != "slots"

    @property
    def _size(self) -> float:
        """c: what a unit query is multiplied by, so that its mean square is 1."""
        return (self.d_model / self.n_heads) ** 0.5 if self.memory.normalize == "l2" else 1.0

    @property
    def _square_norm(self) -> float:
        return 1.0 if self.memory.normalize == "l2" else self.d_model / self.n_heads

    def _heads(self, x_BTD: Array) -> Array:
        normalize = unit_normalize if self.memory.normalize == "l2" else rms_normalize
        return normalize(x_BTD.reshape(*x_BTD.shape[:2], self.n_heads, -1))

    def _patterns(self) -> Array | None:
        if self.memory.patterns == "context":
            return None
        normalize = unit_normalize if self.memory.normalize == "l2" else rms_normalize
        return normalize(self.slots)

    def _recall(self, xi_BTHd: Array, drive: Drive) -> Recalled:
        return recall(xi_BTHd, drive.keys_BHCd, self._patterns(), self.beta,
                      visible_BTC=drive.visible_BTC, document_ids_BT=drive.document_ids_BT,
                      dtype=self.dtype)

    def _look(self, drive: Drive) -> Any:
        """xi -> retrieve(xi), of arrays that are read here, outside of any loop."""
        beta_H, slots_SHd, keys_BHCd = self.beta, self._patterns(), drive.keys_BHCd
        if slots_SHd is None and drive.visible_BTC is None and self.backend != "xla":
            assert keys_BHCd is not None
            keys_BTHd = jnp.moveaxis(keys_BHCd, 1, 2)
            return lambda xi: attention(
                (xi * beta_H[:, None]).astype(self.dtype), keys_BTHd, keys_BTHd, scale=1.0,
                document_ids=drive.document_ids_BT, backend=self.backend).astype(jnp.float32)
        return lambda xi: recall(
            xi, keys_BHCd, slots_SHd, beta_H, visible_BTC=drive.visible_BTC,
            document_ids_BT=drive.document_ids_BT, dtype=self.dtype).value_BTHd

    def _read(self, a_BTD: Array, drive: Drive) -> tuple[Array, Any]:
        if drive.valid_BT is None:
            return self.ssm(a_BTD, drive.document_ids_BT, drive.positions_BT)[0], None
        result: Any = self.ssm.extend(a_BTD, drive.positions_BT, drive.ssm_cache, drive.valid_BT)
        return result

    def _kept(self, new: Array, old: Array, drive: Drive) -> Array:
        """The old value of tokens that do not count."""
        if drive.valid_BT is None:
            return new
        valid = drive.valid_BT.reshape(*drive.valid_BT.shape, *[1] * (new.ndim - 2))
        return jnp.where(valid, new, old)
