"""SegmentReasoner: the stack reads its own first thought before its second.

    h^1 = F(x; b = 0)
    b^{r+1}_t = controller(h^r_t),   h^{r+1} = F(x [+ W_r rms(h^r)]; b^{r+1})        r = 1 .. R-1

All passes share the parameters of F. The controller reads token by token, so a pass never sees
more than the past. `gradient="stop"` cuts the gradient where the controller reads.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from hippocampus.config import PATHS, HybridConfig
from hippocampus.layers.edits import Edit, no_edit
from hippocampus.layers.h_controller import HController
from hippocampus.layers.norms import RMSNorm
from hippocampus.models.interventions import NEUTRAL, Interventions, change_controller

Stack = Callable[[Array, Array | None, Edit, int], tuple[Array, dict[str, Array]]]
"""(x_BTD, control_LBTP or None, edit, pass) -> (h_BTD, out)."""


class SegmentReasoner(nn.Module):
    """Runs a stack R times with a controller in between."""

    config: HybridConfig
    dtype: jnp.dtype = jnp.float32
    edit: Edit = no_edit

    @nn.compact
    def __call__(
        self, stack: Stack, x_BTD: Float[Array, "B T D"], passes: int,
        interventions: Interventions = NEUTRAL, weight_BT: Float[Array, "B T"] | None = None,
    ) -> tuple[list[Float[Array, "B T D"]], dict[str, Array]]:
        """Runs the passes.

        Args:
          stack: the layers.
          x_BTD: embeddings.
          passes: R; a model that was trained with one pass has no controller, and every further
            pass would repeat the first.
          interventions: what a probe changes of the controller. Where it chooses a pass, those
            beyond the trained number run only if the choice needs them, and give nothing but
            their "segments.<r>.hidden" (of a pass that did not run, the last that did).
          weight_BT: how much each token counts for `interventions.controller`; None = all alike.

        Returns:
          h_BTD of every pass, and `out`: the last pass's names as they are ("layers.0.ssm.out",
          "controller.bias"), earlier ones under "segments.<r>." (r from 0), and
          "segments.<r>.hidden" for all.
        """
        cfg, chosen = self.config, interventions.segments
        if cfg.segments.train > 1:
            controller = HController(cfg.n_layers, len(PATHS), cfg.segments.controller_width,
                                     cfg.norm_epsilon, self.dtype, name="controller")
            if cfg.segments.feedback:
                norm = RMSNorm(cfg.norm_epsilon, self.dtype, name="feedback_norm")
                feedback = nn.Dense(cfg.d_model, use_bias=False, dtype=self.dtype,
                                    kernel_init=nn.initializers.zeros, name="feedback")
        else:
            passes = 1
        if weight_BT is None:
            weight_BT = jnp.ones(x_BTD.shape[:2])
        hidden: list[Array] = []
        out: dict[str, Array] = {}
        last = passes - 1 if chosen is None else cfg.segments.train - 1
        for r in range(passes):
            edit = self._edit_of_pass(r)
            control_LBTP, start_BTD, part = None, x_BTD, {}
            if r > 0:
                read = hidden[-1]
                if cfg.segments.gradient == "stop":
                    read = jax.lax.stop_gradient(read)
                bias_LBTP = change_controller(controller(read), interventions, weight_BT)
                part["controller.bias"] = control_LBTP = edit("controller.bias", bias_LBTP)
                if cfg.segments.feedback:
                    start_BTD = x_BTD + feedback(norm(read))
            if r <= last:
                h_BTD, layers_out = stack(start_BTD, control_LBTP, edit, r)
                part.update(layers_out)
                h_BTD = edit("hidden", h_BTD)
            else:
                h_BTD = _if(jnp.asarray(chosen) > r, stack, start_BTD, control_LBTP, edit, r,
                            hidden[-1])
            out[f"segments.{r}.hidden"] = h_BTD
            hidden.append(h_BTD)
            prefix = "" if r == last else f"segments.{r}."
            out.update({prefix + name: value for name, value in part.items()})
        return hidden, out

    def _edit_of_pass(self, r: int) -> Edit:
        """An edit named "x" acts in every pass, "segments.<r>.x" in one."""
        if self.edit is no_edit:
            return no_edit
        return lambda name, value: self.edit(f"segments.{r}.{name}", self.edit(name, value))


def _if(needed: Array, stack: Stack, x_BTD: Array, control_LBTP: Array | None, edit: Edit, r: int,
        before_BTD: Array) -> Array:
    """The states of a pass, or those before it: a conditional, so that they cost nothing."""
    return jax.lax.cond(
        needed, lambda: edit("hidden", stack(x_BTD, control_LBTP, edit, r)[0]), lambda: before_BTD)
