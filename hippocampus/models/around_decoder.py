"""What models around a pretrained decoder have in common: which half is trained, and the head.

Parameters lie as `backbone`, the decoder's tree, and what the model adds to it. Of the decoder
nothing is trained, low-rank adapters beside its matrices, or all of it (`train_backbone`,
hippocampus.models.halves); what is added always is.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jaxtyping import Array, Float

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.decoder import Decoder
from hippocampus.backbones.loading import build_decoder
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.lora import LoRA, init_adapters, with_adapters
from hippocampus.ops.cross_entropy import Head


class AroundDecoder:
    """Methods of a Flax module with these attributes; the module creates `backbone`.

    Attributes:
      config: the decoder's architecture.
      compute_dtype, scan_layers, remat, backend: as of `Decoder`.
      train_backbone: "none", "lora" or "full".
      lora: which matrices have adapters, with "lora".
    """

    backbone: Any
    config: Architecture
    compute_dtype: str
    scan_layers: bool
    remat: str
    backend: str
    train_backbone: str
    lora: LoRA

    def norm_out(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The last norm, which the head reads behind."""
        normalised: Array = self.backbone.finish(x_BTD)
        return normalised

    @nn.nowrap
    def decode_params(self, params: Any) -> Any:
        """The parameters with the decoder's in compute dtype."""
        return {**params, "backbone": self._decoder().decode_params(params["backbone"])}

    @nn.nowrap
    def decode_variables(self, params: Any, capacity: int) -> dict[str, Any]:
        """What `apply(…, method="extend")` takes; `capacity` is of no effect."""
        return {"params": self.decode_params(params)}

    @nn.nowrap
    def trained(self, params: Any, key: Array) -> Any:
        """What is trained: what the model adds, and the decoder's parameters or adapters of it.

        Args:
          params: all parameters, or their shapes.
          key: random key of the adapters.
        """
        if self.train_backbone == "full":
            return params
        added = {name: tree for name, tree in params.items() if name != "backbone"}
        if self.train_backbone == "none":
            return added
        return {**added, "lora": init_adapters(key, params["backbone"], self.lora)}

    @nn.nowrap
    def frozen(self, params: Any) -> Any:
        """What is not trained: the decoder's parameters, unless all of them are."""
        return {} if self.train_backbone == "full" else {"backbone": params["backbone"]}

    @nn.nowrap
    def whole(self, trained: Any, frozen: Any) -> Any:
        """All parameters, adapters beside their matrices."""
        if self.train_backbone == "full":
            return trained
        backbone = frozen["backbone"]
        if self.train_backbone == "lora":
            backbone = with_adapters(backbone, trained["lora"], self.lora)
        added = {name: tree for name, tree in trained.items() if name != "lora"}
        return {"backbone": backbone, **added}

    @nn.nowrap
    def head(self, params: Any) -> Head:
        """The output layer of a parameter tree."""
        return self._decoder().head(params["backbone"])

    @nn.nowrap
    def distributions(self, out: dict[str, Array]) -> dict[str, Array]:
        """What to draw of a forward pass: nothing."""
        return {}

    @nn.nowrap
    def _decoder(self, edit: Edit = no_edit) -> Decoder:
        return build_decoder(self.config, compute_dtype=self.compute_dtype, backend=self.backend,
                             scan_layers=self.scan_layers, remat=self.remat, edit=edit, parent=None)
