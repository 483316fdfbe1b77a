"""Decoder: embeddings, a stack of layers, a linear head; a pretrained causal language model.

It has the call of the project's own models, so that what trains, decodes and probes those does
so with it. Parameters lie as `embedding`, `layers_0 … layers_n`, `norm_out` and, where the output
has a table of its own, `head`.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.backbones.architecture import Architecture, LayerSpec
from hippocampus.backbones.attention import DecoderAttention, Memory
from hippocampus.backbones.insertion import NOTHING, Insertion
from hippocampus.backbones.llama import LlamaLayer
from hippocampus.data.batches import Batch
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.layer_stack import layer_parameters, run_layers
from hippocampus.layers.lora import has_dropout
from hippocampus.layers.norms import RMSNorm
from hippocampus.layers.self_attention import AttentionCache
from hippocampus.ops.cross_entropy import Head
from hippocampus.ops.embedding import embed, padded_vocabulary
from hippocampus.ops.positions import token_positions


@struct.dataclass
class DecoderCache:
    """What the layers remember of the rows read so far.

    Attributes:
      length_B: tokens that each row has read.
      layers: keys and values of every layer that has its own.
      inserted: what parts that are inserted after attention remember, as "layers_<i>".
    """

    length_B: Int[Array, " B"]
    layers: tuple[AttentionCache, ...]
    inserted: dict[str, Any] = struct.field(default_factory=dict)


class Decoder(nn.Module):
    """A Llama, Qwen3 or Gemma 3; `Gemma3nDecoder` adds what a Gemma-3n has besides.

    `model.apply({"params": params}, tokens_BT)` gives `(logits_BTV, out)`.

    Attributes:
      config: the architecture.
      compute_dtype: of matrix products; norms, positions and softmax are float32.
      scan_layers: compile runs of equal layers once.
      remat: "none", "dots" or "full": what the backward pass computes again.
      backend: of attention (see `hippocampus.ops.attention`).
      edit: changes named intermediates (see `hippocampus.layers.edits`).
    """

    config: Architecture
    compute_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    backend: str = "xla"
    edit: Edit = no_edit

    layer_class: ClassVar[type[nn.Module]] = LlamaLayer
    flow_width: ClassVar[int] = 0

    def setup(self) -> None:
        """Creates the parameters: a table or two, and one tree per layer."""
        cfg = self.config
        self.dtype = jnp.dtype(self.compute_dtype)
        table = nn.initializers.normal(cfg.d_model**-0.5)
        shape = (padded_vocabulary(cfg.vocab_size), cfg.d_model)
        self.embedding_VD = self.param("embedding", table, shape)
        if not cfg.tie_embeddings:
            self.param("head", table, shape)
        names = [f"layers_{i}" for i in range(len(cfg.layers))]
        self.layer_params = layer_parameters(self, names, cfg.layers, self._init_layer)
        self.norm_out = RMSNorm(cfg.norm_epsilon, self.dtype, offset=cfg.norm_offset)

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
        self, batch: Batch, state: dict | None = None, *, interventions: Any = None,
        train: bool = False, progress: Any = None, inserted: Insertion | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], dict]:
        """Final hidden states of every token.

        Args:
          batch: tokens, and where documents begin.
          state: carried between batches by models that need it; empty here.
          interventions: what a probe changes in the parts of a hybrid; a decoder has none of them.
          train: dropout of adapters on (see `hippocampus.layers.lora`); where they have one, it
            needs the random stream "dropout". A decoder alone has none.
          progress: share of a training that is done; of no effect.
          inserted: parts of another model, after the attention of some layers; None = none.

        Returns:
          hidden_BTD (normalised, compute dtype), `out`, and the state. `out["final"]` are the
          states before the last norm, `out["segments.hidden"]` (1,B,T,D) those behind it.
        """
        tokens_BT = batch.tokens_BT
        positions_BT = token_positions(tokens_BT, batch.document_ids_BT, batch.positions_BT)
        x_BTD = self.edit("embedding", self._embed(tokens_BT))
        x, per_layer = self._enter(tokens_BT, x_BTD, train)
        drops = train and has_dropout(self.variables["params"])
        key = self.make_rng("dropout") if drops else None
        x, out = self._run_stack(x, per_layer, key, batch.document_ids_BT, positions_BT,
                                 inserted or NOTHING)
        out["embedding"] = x_BTD
        out["final"] = final_BTD = self.edit("final", self._leave(x, train))
        hidden_BTD = self.norm_out(final_BTD)
        out["segments.hidden"] = hidden_BTD[None]
        return hidden_BTD, out, {}

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, passes: int | None = None) -> DecoderCache:
        """The cache before the first token; needs no parameters.

        Args:
          batch: rows B.
          max_length: tokens that a row can look back to, itself included; beyond them attention
            sees the last `max_length`.
          passes: always one.
        """
        dtype = jnp.dtype(self.compute_dtype)
        return DecoderCache(jnp.zeros((batch,), jnp.int32), tuple(
            DecoderAttention(self.config, spec, dtype, parent=None).init_cache(batch, max_length)
            for spec in self.config.layers[:self.config.n_own_layers]))

    def extend(
        self, tokens_Bn: Int[Array, "B n"], cache: DecoderCache,
        valid_Bn: Bool[Array, "B n"] | None = None, *, skip: bool = False,
    ) -> tuple[Float[Array, "B n D"], DecoderCache]:
        """Reads further tokens of every row; the law: in any chunks, what `forward` gives at once.

        Args:
          tokens_Bn: any number n >= 1 of tokens a row.
          cache: from `init_cache` or the last call.
          valid_Bn: a row's valid tokens come first; the others leave its cache as it is, and
            their outputs mean nothing. None = all are valid.
          skip: of no effect; there is one pass.

        Returns:
          hidden_BnD (normalised, compute dtype), and the new cache.
        """
        final_BnD, cache = self.extend_stream(tokens_Bn, cache, valid_Bn)
        return self.norm_out(final_BnD), cache

    def extend_stream(
        self, tokens_Bn: Int[Array, "B n"], cache: DecoderCache,
        valid_Bn: Bool[Array, "B n"] | None = None, inserted: Insertion | None = None,
    ) -> tuple[Float[Array, "B n D"], DecoderCache]:
        """`extend` up to the states before the last norm, with what is inserted (as `forward`)."""
        if valid_Bn is None:
            valid_Bn = jnp.ones(tokens_Bn.shape, bool)
        positions_Bn = cache.length_B[:, None] + jnp.cumsum(valid_Bn, axis=1) - valid_Bn
        x, per_layer = self._enter(tokens_Bn, self._embed(tokens_Bn))
        caches: list[AttentionCache] = []
        memories: dict[int, Memory] = {}
        inserted, remembered = inserted or NOTHING, {}
        for i, spec in enumerate(self.config.layers):
            own, name = spec.source < 0, f"layers_{i}"
            x, out, new, memories[i] = self._layer(spec).apply(
                {"params": self.layer_params[i]}, x, positions_Bn,
                None if per_layer is None else per_layer[i], valid_BT=valid_Bn,
                cache=cache.layers[i] if own else None, source=memories.get(spec.source),
                after_attention=inserted.bound(
                    inserted.arrays.get(i), positions_Bn, cache=cache.inserted.get(name),
                    valid_BT=valid_Bn))
            if own:
                caches.append(new)
            if i in inserted.arrays:
                remembered[name] = out["adapter.cache"]
        return self._leave(x), DecoderCache(cache.length_B + valid_Bn.sum(1), tuple(caches),
                                            remembered)

    def finish(self, final_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The last norm, for a model that adds something in front of it."""
        hidden_BTD: Array = self.norm_out(final_BTD)
        return hidden_BTD

    @nn.nowrap
    def reset(self, cache: DecoderCache, rows_B: Bool[Array, " B"]) -> DecoderCache:
        """The cache with these rows as before their first token; the others keep every bit."""
        def clear(array: Array) -> Array:
            chosen = rows_B.reshape(-1, *[1] * (array.ndim - 1))
            return jnp.where(chosen, jnp.zeros((), array.dtype), array)

        return jax.tree.map(clear, cache)

    @nn.nowrap
    def decode_params(self, params: Any) -> Any:
        """The parameters with matrices and tables in compute dtype, as every use casts them."""
        dtype = jnp.dtype(self.compute_dtype)
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, params)

    @nn.nowrap
    def decode_variables(self, params: Any, capacity: int) -> dict[str, Any]:
        """What `apply(…, method="extend")` takes; `capacity` is of no effect."""
        return {"params": self.decode_params(params)}

    def head(self, params: Any) -> Head:
        """The output layer of a parameter tree."""
        weight = params["embedding" if self.config.tie_embeddings else "head"]
        return Head(weight, softcap=self.config.softcap, vocab_size=self.config.vocab_size)

    def statistics(self, out: dict[str, Array],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
        """What to log of a forward pass: nothing."""
        return {}

    def distributions(self, out: dict[str, Array]) -> dict[str, Array]:
        """What to draw of a forward pass: nothing."""
        return {}

    def init_state(self, batch: Batch) -> dict:
        """What `forward` carries from batch to batch: nothing."""
        return {}

    def _embed(self, tokens_BT: Array) -> Array:
        # A tied table is gathered for the head, and XLA may keep it for that: a lookup of few rows
        # without it costs little where it does, and saves a gather where it does not.
        share = 1 / 8 if self.config.tie_embeddings else 1.0
        x_BTD = embed(self.embedding_VD, tokens_BT, exchange_below=share).astype(self.dtype)
        return x_BTD * jnp.asarray(self.config.d_model**0.5, self.dtype) if (
            self.config.is_gemma) else x_BTD

    def _enter(self, tokens_BT: Array, x_BTD: Array,
               train: bool = False) -> tuple[Array, Array | None]:
        """What the first layer reads, and the input of each layer (a leading L axis)."""
        return x_BTD, None

    def _leave(self, x: Array, train: bool = False) -> Array:
        """The last layer's result as one stream."""
        return x

    def _layer(self, spec: LayerSpec, edit: Edit = no_edit) -> Any:
        kind: Any = self.layer_class
        return kind(self.config, spec, jnp.dtype(self.compute_dtype), self.backend, edit,
                    parent=None)

    def _init_layer(self, key: Array, spec: LayerSpec) -> dict:
        params: dict = _initialise(self._layer(spec), key)
        return params

    def _run_stack(
        self, x: Array, own_inputs: Array | None, key: Array | None,
        document_ids_BT: Array | None, positions_BT: Array, inserted: Insertion,
    ) -> tuple[Array, dict[str, Array]]:
        """All layers in order: those with their own keys, then those that read the keys of them."""
        specs, own = self.config.layers, self.config.n_own_layers
        per_layer = {"input": own_inputs,
                     "key": None if key is None else jax.random.split(key, len(specs))}
        # A layer is compiled apart from those where nothing is inserted, and with those like it.
        trees = [(params, inserted.arrays.get(i)) for i, params in enumerate(self.layer_params)]
        out: dict[str, Array] = {}
        if self.is_initializing():  # the layers' parameters are made in setup
            return x, {}
        for start, stop in ((0, own), (own, len(specs))):
            memories = {spec.source: Memory(out[f"layers.{spec.source}.attention.key"],
                                            out[f"layers.{spec.source}.attention.value"])
                        for spec in specs[start:stop] if spec.source >= 0}

            def apply_layer(spec: LayerSpec, tree: Any, x: Array, layer: dict[str, Any],
                            edit: Edit = no_edit, memories: Any = memories) -> Any:
                rngs = {} if layer["key"] is None else {"dropout": layer["key"]}
                return self._layer(spec, edit).apply(
                    {"params": tree[0]}, x, positions_BT, layer["input"], rngs=rngs,
                    document_ids_BT=document_ids_BT, source=memories.get(spec.source),
                    after_attention=inserted.bound(
                        tree[1], positions_BT, document_ids_BT=document_ids_BT))[:2]

            if self.edit is no_edit:
                x, found = run_layers(
                    apply_layer, specs[start:stop], trees[start:stop], x,
                    jax.tree.map(lambda array, a=start, b=stop: array[a:b], per_layer),
                    scan=self.scan_layers, remat=self.remat, first=start)
                out.update(found)
                continue
            for i in range(start, stop):  # a callable edit knows layers by name
                layer = jax.tree.map(lambda array, i=i: array[i], per_layer)
                x, found = apply_layer(specs[i], trees[i], x, layer,
                                       scoped(self.edit, f"layers.{i}."))
                out.update({f"layers.{i}.{name}": value for name, value in found.items()})
        return x, out


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _initialise(layer: Any, key: Array) -> Any:
    """The first parameters of a layer; layers that are alike share one trace."""
    cfg, dtype = layer.config, layer.dtype
    x: Array = jnp.zeros((1, 2, cfg.d_model), dtype)
    per_layer = None
    if cfg.altup:
        x = jnp.stack([x] * cfg.altup.streams)
        per_layer = jnp.zeros((1, 2, cfg.altup.per_layer_width), dtype)
    other = jnp.zeros((1, 2, cfg.n_kv_heads, cfg.head_width), dtype)
    source = Memory(other, other) if layer.spec.source >= 0 else None
    return layer.init(key, x, jnp.zeros((1, 2), jnp.int32), per_layer, source=source)["params"]
