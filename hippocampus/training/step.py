"""One optimizer step as a pure function, and its jitted, sharded, donating form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hippocampus import xla_flags
from hippocampus.config import Config
from hippocampus.data.batches import Batch
from hippocampus.models.halves import frozen_shapes, whole
from hippocampus.training import sharding
from hippocampus.training.equilibrium import skips_expansion, too_few_converge
from hippocampus.training.guard import broken_tokens, judge, unless
from hippocampus.training.losses import training_loss
from hippocampus.training.optimizer import learning_rate_schedule
from hippocampus.training.state import TrainState, ema_decay, init_state

Metrics = dict[str, Float[Array, ""]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train_step(model: Any, optimizer: optax.GradientTransformation, config: Config) -> TrainStep:
    """The step (state, batch) -> (state, metrics), to be jitted.

    Gradients are sums over tokens divided by the whole step's token weight, so that k
    micro-batches give what one big batch gives.
    """
    schedule = learning_rate_schedule(config.optimizer, config.train.steps)
    k = config.train.grad_accumulation

    def gradients(params: Any, frozen: Any, batch: Batch, carried: Any, key: Array,
                  progress: Array) -> tuple[Any, dict[str, Array], Any]:
        def loss(params: Any) -> tuple[Array, tuple[dict[str, Array], Any]]:
            total, (sums, out, after) = training_loss(
                model, whole(model, params, frozen), batch, key, config, carried, progress)
            return total, ({**sums, **model.statistics(out, batch.loss_weight_BT)}, after)

        grads, (sums, after) = jax.grad(loss, has_aux=True)(params)
        return sharding.constrain_parameters(grads, config.mesh, gathered=False), sums, after

    # To trace a model takes seconds. Inlined, its shapes and the loop's body share one trace.
    traced_once = jax.jit(gradients, inline=True)

    def accumulate(params: Any, frozen: Any, batch: Batch, carried: Any, key: Array,
                   progress: Array) -> tuple[Any, dict[str, Array], Any]:
        # Every k-th row, not every k-th block: a device's rows stay on the device.
        micro = jax.tree.map(
            lambda a: jnp.swapaxes(a.reshape(a.shape[0] // k, k, *a.shape[1:]), 0, 1),
            (batch, carried))

        def add(total: Any, part: tuple[Batch, Any, Array]) -> tuple[Any, Any]:
            *found, after = traced_once(params, frozen, *part, progress)
            with jax.named_scope("optimizer"):
                return jax.tree.map(jnp.add, total, found), after

        keys = jax.random.split(key, k)
        first = jax.tree.map(lambda a: a[0], micro)
        *shapes, _ = jax.eval_shape(traced_once, params, frozen, *first, keys[0], progress)
        with jax.named_scope("optimizer"):
            zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (grads, sums), after = jax.lax.scan(add, zero, (*micro, keys))
        return grads, sums, jax.tree.map(
            lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), after)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        progress = state.step / config.train.steps
        params = sharding.constrain_parameters(state.params, config.mesh, gathered=True)
        grads, sums, carried = (gradients if k == 1 else accumulate)(
            params, state.frozen, batch, state.carried, key, progress)
        weight = jnp.maximum(sums.pop("weight"), 1.0)
        means = {name: total / weight for name, total in sums.items()}
        with jax.named_scope("optimizer"):
            grads = jax.tree.map(lambda g: g / weight, grads)
            loss, norm = means.pop("nll"), optax.tree.norm(grads)
        broken = (broken_tokens(batch, config.model.vocab_size) > 0) | ~jnp.isfinite(means["total"])
        if skips_expansion(config.model):
            broken |= too_few_converge(config.model, means["solver/converged"], progress)
        skip, guard = judge(state.guard, config.guard, loss, norm, broken)
        metrics = {"train/loss": loss, "train/grad_norm": norm,
                   "train/learning_rate": schedule(updates_done(state)),
                   "train/skipped": guard["skipped"].astype(jnp.float32),
                   "train/skipped_in_a_row": guard["in_a_row"].astype(jnp.float32)}
        metrics.update({name if "/" in name else f"train/{name}": value
                        for name, value in means.items()})
        with jax.named_scope("optimizer"):
            params, ema, opt_state, carried = unless(
                skip, (*update(state, grads), carried),
                (state.params, state.ema, state.opt_state, state.carried))
        return TrainState(state.step + 1, params, ema, opt_state, state.key, guard,
                          carried, state.frozen), metrics

    def update(state: TrainState, grads: Any) -> tuple[Any, Any, optax.OptState]:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params, ema = optax.apply_updates(state.params, updates), state.ema
        if config.ema.decay:
            with jax.named_scope("ema"):
                mu = ema_decay(config.ema.decay, state.step)
                ema = jax.tree.map(lambda e, p: mu * e + (1 - mu) * p, ema, params)
        return params, ema, opt_state

    return step


def updates_done(state: TrainState) -> Int[Array, ""]:
    """Updates that the optimizer counted, which skipped steps are not among.

    An optimizer that counts nothing has no schedule; then the step stands for it.
    """
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    return counts[0][1] if counts else state.step


def jit_train_step(step: TrainStep, mesh: Mesh, state_shardings: Any,
                   nested: bool = False) -> TrainStep:
    """The step compiled for a mesh; the old state's buffers become the new state's.

    Args:
      step: a pure function.
      mesh: of the devices that it runs on.
      state_shardings: where the new state lies.
      nested: as a part of another program, to which buffers and the compiler's options belong.
    """
    place = functools.partial(jax.jit, sharding.on_mesh(step, mesh),
                              out_shardings=(state_shardings, sharding.replicated(mesh)))
    if nested:
        return place()
    options = xla_flags.compiler_options(mesh.devices.flat[0].platform, mesh.size)
    return place(donate_argnums=0, compiler_options=options or None)


def sharded_init(model: Any, optimizer: optax.GradientTransformation, config: Config,
                 mesh: Mesh) -> tuple[Callable[[], TrainState], TrainState, Any]:
    """How to make the first state where it belongs.

    Returns:
      A function that makes it but for what is frozen, which is read from files; its abstract form
      (shapes with shardings, for a restore), and the shardings.
    """
    # As numpy, because every process of a run has it.
    seed = np.asarray(jax.random.key_data(jax.random.key(config.train.seed)))

    def make(seed: Any) -> TrainState:
        return init_state(model, optimizer, config, jax.random.wrap_key_data(seed))

    shapes = jax.eval_shape(make, seed)
    made = sharding.tree_shardings(mesh, shapes, config.mesh.rules).replace(
        carried=jax.tree.map(lambda a: sharding.batch_sharding(mesh, 1), shapes.carried))
    shapes = shapes.replace(frozen=frozen_shapes(model, config))
    shardings = made.replace(
        frozen=sharding.tree_shardings(mesh, shapes.frozen, config.mesh.rules))
    like = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    return functools.partial(jax.jit(make, out_shardings=made), seed), like, shardings
