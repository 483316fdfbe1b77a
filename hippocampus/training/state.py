"""All that a run must not lose, as one pytree."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from hippocampus.config import Config, GuardConfig
from hippocampus.data.batches import Batch
from hippocampus.models.build_model import initialise
from hippocampus.models.halves import trained_half
from hippocampus.training.guard import Guard, first_guard, zeros_like


@struct.dataclass
class TrainState:
    """Parameters, their average, the optimizer's state, and where the run is.

    Attributes:
      step: steps done, the skipped ones too; the optimizer has a count of its own updates.
      params: float32 parameter tree: what is trained (`hippocampus.models.halves`).
      ema: the running average, or {} when it is off.
      opt_state: of optax.
      key: the run's random key; a step uses `fold_in(key, step)`.
      guard: skipped steps, and what they are told by (hippocampus.training.guard).
      carried: what the model's `forward` carries from batch to batch; {} for most families.
      frozen: what of the model's parameters is not trained; in no checkpoint. {} for most families.
    """

    step: Int[Array, ""]
    params: Any
    ema: Any
    opt_state: optax.OptState
    key: Array
    guard: Guard
    carried: Any = struct.field(default_factory=dict)
    frozen: Any = struct.field(default_factory=dict)

    def trees(self) -> dict[str, Any]:
        """The state as the named trees of a checkpoint, without what is never changed."""
        trees = {"params": self.params, "optimizer": self.opt_state, "guard": self.guard,
                 "progress": {"step": self.step, "key": self.key}}
        some = {"ema": self.ema, "carried": self.carried}
        return {**trees, **{name: tree for name, tree in some.items() if jax.tree.leaves(tree)}}

    @staticmethod
    def from_trees(trees: dict[str, Any], like: TrainState | None = None) -> TrainState:
        """What `trees` took apart.

        Args:
          trees: of a checkpoint. Without "guard", which runs of older versions lack, it is fresh;
            "carried" is zeros then.
          like: the state's abstract form, for the shapes and the place of what is fresh; None:
            a guard without the spike rule, and nothing carried.
        """
        progress = trees["progress"]
        guard, carried = trees.get("guard"), trees.get("carried")
        if guard is None:
            guard = zeros_like(like.guard) if like is not None else first_guard(GuardConfig())
        if carried is None:
            carried = zeros_like(like.carried) if like is not None else {}
        return TrainState(progress["step"], trees["params"], trees.get("ema", {}),
                          trees["optimizer"], progress["key"], guard, carried)


def init_state(model: Any, optimizer: optax.GradientTransformation, config: Config,
               key: Array | None = None) -> TrainState:
    """The state before the first step; a pure function of `train.seed`.

    Args:
      model, optimizer, config: of the run.
      key: the seed's key, for a program that is the same for all seeds. None = made here.
    """
    key = jax.random.key(config.train.seed) if key is None else key
    key_params, key_run = jax.random.split(key)
    params = trained_half(model, initialise(model)(key_params), jax.random.fold_in(key_params, 0))
    # A copy: the step donates its buffers, and no buffer may be donated twice.
    ema = jax.tree.map(jnp.copy, params) if config.ema.decay else {}
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), key_run,
                      first_guard(config.guard), model.init_state(_nothing(config)))


def _nothing(config: Config) -> Batch:
    """A training batch without a token that counts, for the shapes of what a model carries."""
    shape = (config.train.batch_size, config.data.context)
    zeros_BT = jnp.zeros(shape, jnp.int32)
    return Batch(zeros_BT, zeros_BT, jnp.zeros(shape, jnp.float32))


def ema_decay(decay: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """min(decay, (1 + t) / (10 + t)): the average forgets its start quickly."""
    t = step.astype(jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))
