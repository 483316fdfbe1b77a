"""HybridLM: embeddings, the segment reasoner over a stack of hybrid blocks, a linear head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import HybridConfig
from hippocampus.data.batches import Batch
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.layer_stack import layer_parameters, run_layers
from hippocampus.layers.norms import RMSNorm, rms_normalize
from hippocampus.layers.velocity_field import VelocityField
from hippocampus.models import gate_statistics, single_token
from hippocampus.models.decode_parameters import cast_parameters
from hippocampus.models.hybrid_block import BlockSpec, HybridBlock, block_specs
from hippocampus.models.interventions import NEUTRAL, Interventions
from hippocampus.models.segment_reasoner import SegmentReasoner
from hippocampus.ops.cross_entropy import Head
from hippocampus.ops.embedding import embed, padded_vocabulary
from hippocampus.ops.kernels import decode_gpu
from hippocampus.ops.positions import token_positions

_NOISE = 2**31
"""Random stream of the token noise; those of the passes are counted from 0."""


@struct.dataclass
class HybridCache:
    """What every layer of every pass remembers of the rows read so far.

    Attributes:
      length_B: tokens that each row has read.
      passes: for each pass, for each layer, the cache of each path by name.
    """

    length_B: Int[Array, " B"]
    passes: tuple[tuple[dict[str, Any], ...], ...]


class HybridLM(nn.Module):
    """A causal language model with three kinds of memory in every block.

    `model.apply({"params": params}, tokens_BT)` gives `(logits_BTV, out)`. `flow_width` > 0 adds
    the velocity network of the segment flow. `max_length` is the number of learned positions.
    """

    config: HybridConfig
    flow_width: int = 0
    edit: Edit = no_edit

    def setup(self) -> None:
        """Creates the parameters: a table or two, and one tree per layer."""
        cfg = self.config
        self.dtype = jnp.dtype(cfg.compute_dtype)
        self.specs = block_specs(cfg)
        width = cfg.embedding_width or cfg.d_model
        table = nn.initializers.normal(width**-0.5)
        shape = (padded_vocabulary(cfg.vocab_size), width)
        self.embedding_VE = self.param("embedding", table, shape)
        if cfg.embedding_width:
            self.embedding_up = nn.Dense(cfg.d_model, use_bias=False, dtype=self.dtype)
            self.param("head_down", nn.initializers.lecun_normal(), (cfg.d_model, width))
        if cfg.position == "learned":
            self.position_TD = self.param("position_embedding", nn.initializers.normal(0.02),
                                          (cfg.max_length, cfg.d_model))
        if not cfg.tie_embeddings:
            self.param("head", table, shape)
        names = [f"layers_{i}" for i in range(cfg.n_layers)]
        self.layer_params = layer_parameters(self, names, self.specs, self._init_layer)
        self.reasoner = SegmentReasoner(cfg, self.dtype, self.edit)
        self.norm_out = RMSNorm(cfg.norm_epsilon, self.dtype)
        if self.flow_width:
            self.flow = VelocityField(self.flow_width, self.dtype)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> tuple[Float[Array, "B T V"], dict]:
        """Logits of the next token; deterministic.

        Args:
          tokens_BT: token ids below `vocab_size`; every row is one document.

        Returns:
          logits_BTV (float32, V = vocab_size), and the named intermediates.
        """
        batch = Batch(tokens_BT, tokens_BT, jnp.ones(tokens_BT.shape, jnp.float32))
        hidden_BTD, out, _ = self.forward(batch)
        head = self.head(self.variables["params"])
        return head.logits(hidden_BTD)[..., :self.config.vocab_size], out

    def forward(
        self, batch: Batch, state: dict | None = None, *,
        interventions: Interventions = NEUTRAL, train: bool = False,
        progress: Float[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], dict]:
        """Final hidden states of every token.

        Args:
          batch: tokens, and where documents begin.
          state: carried between batches by models that need it; empty here.
          interventions: what a probe changes (evaluation only).
          train: dropout on; needs the random stream "dropout" where a dropout is above 0.
          progress: share of the training that is over; nothing here depends on it.

        Returns:
          hidden_BTD (normalised, compute dtype), `out`, and the state. `out["segments.hidden"]`
          (R,B,T,D) are the normalised states of every pass; with a flow network
          `out["flow.skip_hidden"]` is the first pass plus one Euler step towards the last.
        """
        cfg, tokens_BT = self.config, batch.tokens_BT
        positions_BT = token_positions(tokens_BT, batch.document_ids_BT, batch.positions_BT)
        key = self.make_rng("dropout") if train and self.has_rng("dropout") else None
        if key is not None and cfg.token_noise:
            tokens_BT = noisy(tokens_BT, cfg.token_noise, jax.random.fold_in(key, _NOISE))
        x_BTD = self._embed(tokens_BT)
        if cfg.position == "learned":
            with jax.named_scope("embedding"):
                x_BTD = x_BTD + embed(self.position_TD, positions_BT).astype(self.dtype)
        x_BTD = self.edit("embedding", x_BTD)

        if train:
            interventions = interventions.replace(segments=None)
        passes, chosen = cfg.segments.train, interventions.segments
        if chosen is not None:
            passes = max(cfg.segments.eval, passes)

        def stack(x: Array, control_LBTP: Array | None, edit: Edit, r: int) -> tuple[Array, dict]:
            return self._run_stack(x, control_LBTP, batch.document_ids_BT, positions_BT,
                                   interventions, edit, train,
                                   None if key is None else jax.random.fold_in(key, r))

        states, out = self.reasoner(stack, x_BTD, passes, interventions, batch.loss_weight_BT)
        out["embedding"] = x_BTD
        out["segments.hidden"] = jnp.stack([self.norm_out(h) for h in states])
        if chosen is None or len(states) == 1:
            hidden_BTD = self.norm_out(states[-1])
        else:
            hidden_BTD = self.norm_out(jnp.stack(states)[jnp.asarray(chosen) - 1])
        if self.flow_width:
            out["flow.skip_hidden"] = self._skip(states[0])
        return hidden_BTD, out, {}

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, passes: int | None = None) -> HybridCache:
        """The cache before the first token; needs no parameters.

        Args:
          batch: rows B.
          max_length: tokens that a row can look back to, itself included; beyond them attention
            and Hopfield memory see the last `max_length` and the state-space path all.
          passes: reasoning passes R to run; None = as in training. A model that was trained with
            one pass has no controller, and runs one.
        """
        trained = self.config.segments.train
        dtype = jnp.dtype(self.config.compute_dtype)
        layers = tuple(
            HybridBlock(self.config, spec, dtype, parent=None).init_cache(batch, max_length)
            for spec in block_specs(self.config))
        return HybridCache(jnp.zeros((batch,), jnp.int32),
                           (layers,) * (1 if trained == 1 else passes or trained))

    def extend(
        self, tokens_Bn: Int[Array, "B n"], cache: HybridCache,
        valid_Bn: Bool[Array, "B n"] | None = None, *, skip: bool = False,
    ) -> tuple[Float[Array, "B n D"], HybridCache]:
        """Reads further tokens of every row; the law: in any chunks, what `forward` gives at once.

        Args:
          tokens_Bn: any number n >= 1 of tokens a row.
          cache: from `init_cache`, which chose the number of passes, or the last call.
          valid_Bn: a row's valid tokens come first; the others leave its cache as it is, and
            their outputs mean nothing. None = all are valid.
          skip: give what the flow network takes for the last pass's states, from the last pass
            that is run (needs `flow_width` > 0).

        Returns:
          hidden_BnD (normalised, compute dtype), and the new cache.
        """
        if valid_Bn is None:
            valid_Bn = jnp.ones(tokens_Bn.shape, bool)
        before_Bn = jnp.cumsum(valid_Bn, axis=1) - valid_Bn
        positions_Bn = cache.length_B[:, None] + before_Bn
        x_BnD = self._embed(tokens_Bn)
        if self.config.position == "learned":
            x_BnD = x_BnD + embed(self.position_TD, positions_Bn).astype(self.dtype)
        passes: list[tuple[dict[str, Any], ...]] = []

        def stack(x: Array, control_LBnP: Array | None, edit: Edit, r: int) -> tuple[Array, dict]:
            layers = []
            for i, own in enumerate(cache.passes[r]):
                control_BnP = None if control_LBnP is None else control_LBnP[i]
                x, layer = self._extend_layer(i, x, positions_Bn, own, valid_Bn, control_BnP)
                layers.append(layer)
            passes.append(tuple(layers))
            return x, {}

        states, _ = self.reasoner(stack, x_BnD, len(cache.passes))
        hidden_BnD = self._skip(states[-1]) if skip else self.norm_out(states[-1])
        return hidden_BnD, HybridCache(cache.length_B + valid_Bn.sum(1), tuple(passes))

    @nn.nowrap
    def reset(self, cache: HybridCache, rows_B: Bool[Array, " B"]) -> HybridCache:
        """The cache with these rows as before their first token; the others keep every bit."""
        def clear(array: Array) -> Array:
            chosen = rows_B.reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(chosen, jnp.zeros((), array.dtype), array)

        return jax.tree.map(clear, cache)

    @nn.nowrap
    def decode_params(self, params: Any) -> Any:
        """The parameters with those in compute dtype that every use casts to it anyway.

        Nothing changes in what the model computes; a decoder, which reads all of them for every
        token, reads fewer bytes. Not for training.
        """
        return cast_parameters(params, jnp.dtype(self.config.compute_dtype))

    @nn.nowrap
    def decode_variables(self, params: Any, capacity: int) -> dict[str, Any]:
        """What `apply(…, method="extend")` takes to read single tokens fast.

        Args:
          params: parameters of the model.
          capacity: tokens that the largest cache holds.

        Returns:
          "params", from `decode_params`; and "fused", the matrices for the kernels of
          `single_token`, where those run: with a cuDNN attention backend, in bfloat16, on one
          device. Their results agree to the precision of bfloat16.
        """
        cfg, cast = self.config, self.decode_params(params)
        devices = jax.tree.leaves(params)[0].devices()
        if not (single_token.supports(cfg, capacity) and cfg.attention.backend == "cudnn"
                and cfg.compute_dtype == "bfloat16" and len(devices) == 1
                and next(iter(devices)).platform == "gpu"):
            return {"params": cast}
        layers = {f"layers_{i}": spec for i, spec in enumerate(block_specs(cfg))}
        return {"params": cast, "fused": jax.jit(lambda params: {
            name: single_token.fuse(params[name], spec, jnp.bfloat16)
            for name, spec in layers.items()})(cast)}

    def velocity(self, x_BTD: Float[Array, "B T D"],
                 tau_BT: Float[Array, "B T"]) -> Float[Array, "B T D"]:
        """The segment flow's velocity (needs `flow_width` > 0)."""
        return self.flow(x_BTD, tau_BT)

    def head(self, params: Any) -> Head:
        """The output layer of a parameter tree."""
        weight = params["embedding" if self.config.tie_embeddings else "head"]
        return Head(weight, vocab_size=self.config.vocab_size, down_DE=params.get("head_down"))

    def statistics(self, out: dict[str, Array],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
        """What to log of a forward pass: series name -> weighted sum over its tokens."""
        return gate_statistics.token_sums(block_specs(self.config), out, weight_BT)

    def distributions(self, out: dict[str, Array]) -> dict[str, Array]:
        """What to draw of a forward pass: series name -> values of its tokens."""
        return gate_statistics.distributions(block_specs(self.config), out)

    def init_state(self, batch: Batch) -> dict:
        """What `forward` carries from batch to batch: nothing."""
        return {}

    def _embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Rows of the table, brought to unit size and to the width of the model."""
        rows_BTE = embed(self.embedding_VE, tokens_BT).astype(self.dtype)
        x_BTE = rows_BTE * jnp.asarray(rows_BTE.shape[-1]**0.5, self.dtype)
        return self.embedding_up(x_BTE) if self.config.embedding_width else x_BTE

    def _init_layer(self, key: Array, spec: BlockSpec) -> dict:
        block = HybridBlock(self.config, spec, self.dtype, parent=None)
        x_BTD = jnp.zeros((1, 2, self.config.d_model), self.dtype)
        return block.init(key, x_BTD, None, jnp.zeros((1, 2), jnp.int32))["params"]

    def _run_stack(self, x_BTD: Array, control_LBTP: Array | None, document_ids_BT: Array | None,
                   positions_BT: Array, interventions: Interventions, edit: Edit, train: bool,
                   key: Array | None) -> tuple[Array, dict[str, Array]]:
        """One pass through all layers, as pure functions of their parameter trees."""
        cfg = self.config
        if self.is_initializing():  # the layers' parameters are made in setup
            return x_BTD, {}
        edited = edit is not no_edit

        def apply_layer(spec: BlockSpec, params: Any, x: Array, layer: dict,
                        edit: Edit = no_edit) -> tuple[Array, dict[str, Array]]:
            block = HybridBlock(cfg, spec, self.dtype, edit, parent=None)
            rngs = {} if layer["key"] is None else {"dropout": layer["key"]}
            result: Any = block.apply(
                {"params": params}, x, document_ids_BT, positions_BT, layer["control"],
                interventions.shared(layer["changes"]), train=train, rngs=rngs)
            return result

        per_layer = {"control": control_LBTP, "changes": interventions.of_layers(),
                     "key": None if key is None else jax.random.split(key, cfg.n_layers)}
        if edited:  # a callable edit knows layers by name, so they run one by one
            out: dict[str, Array] = {}
            for i, spec in enumerate(self.specs):
                own = jax.tree.map(lambda array, i=i: array[i], per_layer)
                x_BTD, part = apply_layer(spec, self.layer_params[i], x_BTD, own,
                                          scoped(edit, f"layers.{i}."))
                out.update({f"layers.{i}.{name}": value for name, value in part.items()})
            return x_BTD, out
        return run_layers(apply_layer, self.specs, self.layer_params, x_BTD, per_layer,
                          scan=cfg.scan_layers, remat=cfg.remat)

    def _has_kernels(self, x_BnD: Array) -> bool:
        """Whether one token per row is read, by the kernels for it."""
        B, n = x_BnD.shape[:2]
        fits = B < decode_gpu.ROWS or (B <= decode_gpu.MOST_ROWS and B & (B - 1) == 0)
        return n == 1 and fits and "fused" in self.variables

    def _extend_layer(self, i: int, x_BnD: Array, positions_Bn: Array, caches: dict[str, Any],
                      valid_Bn: Array, control_BnP: Array | None) -> tuple[Array, dict[str, Any]]:
        spec, params = self.specs[i], self.layer_params[i]
        if self._has_kernels(x_BnD):
            fused = self.variables["fused"][f"layers_{i}"]
            x_BD, new = single_token.extend(
                self.config, spec, params, fused, x_BnD[:, 0], positions_Bn[:, 0],
                caches, valid_Bn[:, 0], None if control_BnP is None else control_BnP[:, 0])
            return x_BD[:, None], new
        block = HybridBlock(self.config, spec, self.dtype, parent=None)
        result: Any = block.apply({"params": params}, x_BnD, positions_Bn, caches, valid_Bn,
                                  control_BnP, method="extend")
        return result

    def _skip(self, h_BTD: Array) -> Array:
        """Final hidden states if the last pass were one Euler step away from the first."""
        x0 = rms_normalize(h_BTD, self.config.norm_epsilon)
        velocity = self.flow(x0.astype(self.dtype), jnp.zeros(x0.shape[:2]))
        return self.norm_out(x0 + velocity)


def noisy(tokens_BT: Int[Array, "B T"], chance: float, key: Array) -> Int[Array, "B T"]:
    """Replaces tokens, each with the given chance, by what the next row has in its place.

    That is a draw from the unigram distribution which says nothing of the row's own future.

    Source: Xie et al. 2017 (arXiv:1703.02573), section 3.3 (unigram noising).
    """
    replaced_BT = jax.random.bernoulli(key, chance, tokens_BT.shape)
    return jnp.where(replaced_BT, jnp.roll(tokens_BT, -1, axis=0), tokens_BT)
