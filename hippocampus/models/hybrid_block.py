"""HybridBlock: state-space, Hopfield and attention paths side by side, then an MLP.

    u = rms(x);   x = x + mixer(u, {path: path(u)});   x = x + mlp(rms(x))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from hippocampus.config import PATHS, HybridConfig, depth, layer_paths
from hippocampus.layers.dropout import Dropout
from hippocampus.layers.edits import Edit, no_edit, scoped
from hippocampus.layers.gated_mixer import GatedMixer
from hippocampus.layers.mlp import MLP
from hippocampus.layers.mor_hopfield import MoRHopfield
from hippocampus.layers.norms import RMSNorm
from hippocampus.layers.self_attention import SelfAttention
from hippocampus.layers.state_space import state_space
from hippocampus.models.interventions import NEUTRAL_LAYER, LayerInterventions


@dataclass(frozen=True)
class BlockSpec:
    """What differs between the blocks of a stack; equal specs can be compiled once."""

    paths: tuple[str, ...]
    depth: int
    first_shares: tuple[float, ...]


def block_specs(config: HybridConfig) -> tuple[BlockSpec, ...]:
    """The spec of every layer."""
    specs = []
    for i, paths in enumerate(layer_paths(config)):
        dominant = 0 <= config.ssm.dominant_from_layer <= i
        shares = tuple(1 / len(paths) for _ in paths)
        if dominant and "ssm" in paths and len(paths) > 1:
            rest = (1 - config.ssm.dominance) / (len(paths) - 1)
            shares = tuple(config.ssm.dominance if p == "ssm" else rest for p in paths)
        # Layers without retrieval are alike whatever the schedule says of them.
        specs.append(BlockSpec(paths, depth(config, i) if "hopfield" in paths else 0, shares))
    return tuple(specs)


class HybridBlock(nn.Module):
    """One layer of the hybrid."""

    config: HybridConfig
    spec: BlockSpec
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    def __call__(
        self, x_BTD: Float[Array, "B T D"], document_ids_BT: Int[Array, "B T"] | None,
        positions_BT: Int[Array, "B T"], control_BTP: Float[Array, "B T P"] | None = None,
        changes: LayerInterventions = NEUTRAL_LAYER, *, train: bool = False,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """Runs the block.

        Args:
          x_BTD: residual stream.
          document_ids_BT: document of each token; None = one a row.
          positions_BT: position of each token in its document.
          control_BTP: added to the gates' logits; P counts all of `PATHS`, and entries of paths
            that this layer does not have are ignored.
          changes: what a probe changes; P as above.
          train: dropout and path dropout on (random stream "dropout").

        Returns:
          x_BTD, and `out` with the names of each part in front ("ssm.state", "mixer.gates", …),
          "mlp.out" and "residual".
        """
        def read(path: str, u_BTD: Array) -> tuple[Array, dict[str, Array]]:
            stop = {} if path != "hopfield" else {"stop_after": changes.depth}
            y_BTD, out = self._path(path)(u_BTD, document_ids_BT, positions_BT, **stop)
            return changes.move(PATHS.index(path), y_BTD), out

        return self._run(x_BTD, read, control_BTP, changes, train)

    def init_cache(self, batch: int, max_length: int) -> dict[str, Any]:
        """The cache of every path by its name; `max_length` as for `SelfAttention`."""
        return {path: self._path(path, parent=None).init_cache(
            batch, max_length, self.config.d_model) for path in self.spec.paths}

    def extend(
        self, x_BnD: Float[Array, "B n D"], positions_Bn: Int[Array, "B n"],
        caches: dict[str, Any], valid_Bn: Bool[Array, "B n"],
        control_BnP: Float[Array, "B n P"] | None = None,
    ) -> tuple[Float[Array, "B n D"], dict[str, Any]]:
        """Reads further tokens of every row; arguments as for the paths and for `__call__`."""
        new: dict[str, Any] = {}

        def read(path: str, u_BnD: Array) -> tuple[Array, dict[str, Array]]:
            y_BnD, new[path] = self._path(path).extend(u_BnD, positions_Bn, caches[path], valid_Bn)
            return y_BnD, {}

        x_BnD, _ = self._run(x_BnD, read, control_BnP)
        return x_BnD, new

    @nn.compact
    def _run(self, x_BTD: Array, read: Callable[[str, Array], tuple[Array, dict[str, Array]]],
             control_BTP: Array | None, changes: LayerInterventions = NEUTRAL_LAYER,
             train: bool = False) -> tuple[Array, dict[str, Array]]:
        cfg, edit = self.config, self.edit
        out: dict[str, Array] = {}
        u_BTD = RMSNorm(cfg.norm_epsilon, self.dtype, name="norm_paths")(x_BTD)
        branches = {}
        for path in self.spec.paths:
            branches[path], part = read(path, u_BTD)
            out.update({f"{path}.{name}": value for name, value in part.items()})

        present = jnp.asarray([PATHS.index(path) for path in self.spec.paths])
        control_BTP, path_mask_P, gate_override_P = (
            None if array is None else array[..., present]
            for array in (control_BTP, changes.path_mask_P, changes.gate_override_P))
        mixed_BTD, part = GatedMixer(
            cfg.mixer, self.spec.first_shares, epsilon=cfg.norm_epsilon,
            scale_init=(2 * cfg.n_layers) ** -0.5, dtype=self.dtype,
            edit=scoped(edit, "mixer."), name="mixer",
        )(u_BTD, branches, control_BTP, path_mask_P, gate_override_P, changes.renormalize,
          train=train)
        out.update({f"mixer.{name}": value for name, value in part.items()})

        dropout = Dropout(cfg.dropout, deterministic=not train)
        x_BTD = x_BTD + dropout(mixed_BTD)
        u_BTD = RMSNorm(cfg.norm_epsilon, self.dtype, name="norm_mlp")(x_BTD)
        # Its hidden arrays are the widest of the block, and cost one product to compute again.
        mlp = nn.remat(MLP) if cfg.remat == "mlp" else MLP
        out["mlp.out"] = y_BTD = edit("mlp.out", mlp(cfg.mlp, self.dtype, name="mlp")(u_BTD))
        out["residual"] = x_BTD = edit("residual", x_BTD + dropout(y_BTD))
        return x_BTD, out

    def _path(self, path: str, **parent: None) -> Any:
        cfg: HybridConfig = self.config
        common: dict[str, Any] = {"dtype": self.dtype, "edit": scoped(self.edit, f"{path}."),
                                  **parent}
        if path == "ssm":
            return state_space(cfg.ssm, cfg.n_heads, cfg.norm_epsilon, name=path, **common)
        if path == "hopfield":
            return MoRHopfield(cfg.hopfield, cfg.n_heads, self.spec.depth, cfg.rope_theta,
                               cfg.attention.backend, name=path, **common)
        theta = cfg.rope_theta if cfg.position == "rope" else 0.0
        return SelfAttention(cfg.attention, cfg.n_heads, theta, name=path, **common)
