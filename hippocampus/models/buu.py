"""Buu: a pretrained decoder with gated adapters behind the attention of some of its layers.

    layer i:  h = norm(x),  o = attention(h),  y = adapter_i(h, o)        (layers.gated_adapter)
              x = x + y, and on as the decoder has it

In a Gemma y is normalised before it is added, as o is; of a Gemma-3n's streams it joins the first
one. Where no layer has an adapter the model is the decoder: with low-rank adapters beside its
matrices (`train_backbone`) it is what Buu is compared with.

Parameters lie as `backbone`, the decoder's tree, and `adapters`, a tree `layers_<i>` for each of
the adapted layers. Which half is trained says hippocampus.models.around_decoder.

Source: new layers in a frozen decoder that change nothing at first, Alayrac et al. 2022
(arXiv:2204.14198), section 2.2.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.decoder import DecoderCache
from hippocampus.backbones.insertion import Insertion
from hippocampus.config_adapters import AdaptersConfig, adapted_layers
from hippocampus.data.batches import Batch
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.gated_adapter import AdapterIntervention, GatedAdapter
from hippocampus.layers.lora import LoRA
from hippocampus.models import adapter_statistics
from hippocampus.models.around_decoder import AroundDecoder
from hippocampus.models.interventions import Interventions, Values


class BuuInterventions(struct.PyTreeNode):
    """What a probe changes in the adapters, as arrays: a whole suite then compiles once.

    None = not there; neutral values give the same bits (see `Interventions`).

    Attributes:
      enabled_L: 0 = the layer as the decoder has it. Neutral: ones.
      memory_scale_L: what the memory branch is multiplied by; 0 = it says nothing. Neutral: ones.
      slot_order_LS: slot s gives the value of slot order[s]. Neutral: 0, 1, 2, … in each layer.

    L counts the adapted layers, in order.
    """

    enabled_L: Float[Values, " L"] | None = None
    memory_scale_L: Float[Values, " L"] | None = None
    slot_order_LS: Int[Values, "L S"] | None = None

    @classmethod
    def neutral(cls, n_adapted: int, n_slots: int) -> BuuInterventions:
        """Every array present, and none of them changes anything.

        Args:
          n_adapted: adapted layers L.
          n_slots: S.
        """
        return cls(np.ones(n_adapted, np.float32), np.ones(n_adapted, np.float32),
                   np.tile(np.arange(n_slots, dtype=np.int32), (n_adapted, 1)))

    def of_layer(self, place: int) -> AdapterIntervention:
        """What one adapter reads.

        Args:
          place: among the adapted layers.
        """
        return AdapterIntervention(*jax.tree.map(
            lambda array: jnp.asarray(array)[place],
            (self.enabled_L, self.memory_scale_L, self.slot_order_LS)))


class Buu(AroundDecoder, nn.Module):
    """A decoder and its adapters; see the module's docstring for the maths.

    Attributes:
      config: the decoder's architecture.
      adapters: settings of the adapters.
      compute_dtype, scan_layers, remat, backend: as of `Decoder`.
      train_backbone: "none", "lora" or "full".
      lora: which matrices have low-rank adapters, with "lora".
      edit: of the decoder's names and "layers.<i>.adapter.<name>" of `GatedAdapter`.
    """

    config: Architecture
    adapters: AdaptersConfig
    compute_dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    backend: str = "xla"
    train_backbone: str = "none"
    lora: LoRA = LoRA()
    edit: Edit = no_edit

    flow_width: ClassVar[int] = 0

    def setup(self) -> None:
        """The decoder's parameters, and the adapters'."""
        self.backbone = self._decoder(self.edit)
        layers = self.layers

        def first(key: Array) -> Any:
            trees = jax.vmap(self._first_adapter)(jax.random.split(key, len(layers)))
            return {f"layers_{i}": jax.tree.map(lambda leaf, n=n: leaf[n], trees)
                    for n, i in enumerate(layers)}

        self.adapter_params = self.param("adapters", first) if layers else {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the adapted layers, in order."""
        return adapted_layers(self.adapters, self.config.n_layers)

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
        interventions: BuuInterventions | Interventions | None = None, train: bool = False,
        progress: Any = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array], dict]:
        """Final hidden states of every token.

        Args:
          batch: tokens, and where documents begin.
          state: empty; rows remember nothing of each other.
          interventions: in the adapters; None, or `Interventions` of hybrid models = none.
          train: dropout of low-rank adapters on.
          progress: of no effect.

        Returns:
          hidden_BTD (normalised, compute dtype), `out` of the decoder with
          "layers.<i>.adapter.<name>" of `GatedAdapter`, and the state.
        """
        if not isinstance(interventions, BuuInterventions):
            interventions = BuuInterventions()
        found: tuple[Array, dict, dict] = self.backbone.forward(
            batch, state, train=train, inserted=self._inserted(interventions))
        return found

    @nn.nowrap
    def init_cache(self, batch: int, max_length: int, passes: int | None = None) -> DecoderCache:
        """The cache before the first token; needs no parameters.

        Args:
          batch: rows B.
          max_length: as for `Decoder`; the state of an adapter has the same size after any number
            of tokens.
          passes: always one.
        """
        adapter = self._adapter()
        cache: DecoderCache = self._decoder().init_cache(batch, max_length).replace(  # type: ignore[attr-defined]
            inserted={f"layers_{i}": adapter.init_cache(batch, max_length, self.config.d_model)
                      for i in self.layers})
        return cache

    def extend(
        self, tokens_Bn: Int[Array, "B n"], cache: DecoderCache,
        valid_Bn: Bool[Array, "B n"] | None = None, *, skip: bool = False,
    ) -> tuple[Float[Array, "B n D"], DecoderCache]:
        """Reads further tokens of every row; the law: in any chunks, what `forward` gives at once.

        Args:
          tokens_Bn, valid_Bn, skip: as for `Decoder`.
          cache: from `init_cache` or the last call.

        Returns:
          hidden_BnD (normalised, compute dtype), and the new cache.
        """
        final_BnD, cache = self.backbone.extend_stream(
            tokens_Bn, cache, valid_Bn, self._inserted(BuuInterventions()))
        return self.backbone.finish(final_BnD), cache

    @nn.nowrap
    def reset(self, cache: DecoderCache, rows_B: Bool[Array, " B"]) -> DecoderCache:
        """The cache with these rows as before their first token; the others keep every bit."""
        return self._decoder().reset(cache, rows_B)

    @nn.nowrap
    def statistics(self, out: dict[str, Array],
                   weight_BT: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
        """What to log of a forward pass, as sums over tokens: gates, slots, what is added."""
        return adapter_statistics.token_sums(self.layers, out, weight_BT)

    @nn.nowrap
    def distributions(self, out: dict[str, Array]) -> dict[str, Array]:
        """What to draw of a forward pass: every gate, and the use of every slot."""
        return adapter_statistics.distributions(self.layers, out)

    @nn.nowrap
    def init_state(self, batch: Batch) -> dict:
        """What `forward` carries from batch to batch: nothing."""
        return {}

    def _inserted(self, interventions: BuuInterventions) -> Insertion:
        """The adapters as parts of the decoder's layers."""
        def apply(arrays: Any, h_BTD: Array, attended_BTD: Array, positions_BT: Array, edit: Edit,
                  **how: Any) -> tuple[Array, dict[str, Any]]:
            params, intervention = arrays
            y_BTD, out, cache = self._adapter(edit).apply(
                {"params": params}, h_BTD, attended_BTD, positions_BT, intervention=intervention,
                **how)
            return y_BTD, out if cache is None else {**out, "cache": cache}

        return Insertion(apply, {i: (self.adapter_params[f"layers_{i}"],
                                     interventions.of_layer(place))
                                 for place, i in enumerate(self.layers)})

    @nn.nowrap
    def _adapter(self, edit: Edit = no_edit) -> Any:
        return GatedAdapter(self.adapters, self.config.n_heads, self.config.norm_epsilon,
                            jnp.dtype(self.compute_dtype), edit, parent=None)

    @nn.nowrap
    def _first_adapter(self, key: Array) -> Any:
        x_BTD = jnp.zeros((1, 2, self.config.d_model), jnp.dtype(self.compute_dtype))
        return self._adapter().init(key, x_BTD, x_BTD, jnp.zeros((1, 2), jnp.int32))["params"]
