"""AdamW with a schedule, and with rates and decays of their own for some parameters."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from hippocampus.config import OptimizerConfig
from hippocampus.training.sharding import path_name


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step, 0 for the first update's.

    Linear warm-up from 0, so that step `warmup_steps` has the peak, then: cosine to
    `final_scale` of the peak at the last step; or wsd, constant and then linear over the last
    `decay_fraction` of the run; or constant.

    Args:
      config: the optimizer's fields.
      steps: length of the run. A warm-up longer than that is cut off by the end of the run.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_scale
    warmup = optax.linear_schedule(0.0, peak, max(1, config.warmup_steps))
    rest = max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_scale)
    elif config.schedule == "wsd":
        decay = max(1, round(steps * config.decay_fraction))
        after = optax.linear_schedule(peak, final, decay, max(0, rest - decay))
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    # Step 0 of a warm-up from 0 would be lost, so the schedule starts one step in.
    return lambda step: optax.join_schedules([warmup, after], [config.warmup_steps])(step + 1)


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW, and decay on all that `no_decay` does not match.

    A parameter that one of `groups` matches has that group's learning rate, a multiple of the
    schedule's, and its decay; the first group that matches counts.

    Source: Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2.
    """
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    schedule = learning_rate_schedule(config, steps)
    if config.groups:
        return optax.chain(clip, optax.chain(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
            _by_group(config), optax.scale_by_learning_rate(schedule)))
    return optax.chain(clip, optax.adamw(
        schedule, b1=config.beta1, b2=config.beta2,
        eps=config.epsilon, weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(params, config.no_decay)))


def _by_group(config: OptimizerConfig) -> optax.GradientTransformation:
    """scale * (update + decay * parameter), with each parameter's own two numbers."""
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        decays = decay_mask(params, config.no_decay)

        def one(path: tuple, update: jax.Array, param: jax.Array, decays: bool) -> jax.Array:
            scale, decay = group_of(config, path_name(path))
            return scale * (update + decay * param if decays else update)

        return jax.tree.map_with_path(one, updates, params, decays), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def group_of(config: OptimizerConfig, path: str) -> tuple[float, float]:
    """The learning rate of a parameter, over the schedule's, and its weight decay.

    Args:
      config: the optimizer's fields.
      path: of the parameter, such as "cell/slots".
    """
    return next(((scale, decay) for pattern, scale, decay in config.groups
                 if re.search(pattern, path)), (1.0, config.weight_decay))


def decay_mask(params: Any, no_decay: tuple[str, ...]) -> Any:
    """True for every parameter that weight decay applies to."""
    patterns = [re.compile(pattern) for pattern in no_decay]
    return jax.tree.map_with_path(
        lambda path, _: not any(p.search(path_name(path)) for p in patterns), params)
