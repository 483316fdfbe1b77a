"""Trains over eight virtual devices, one of which meets a poison; run in a process of its own.

    python tests/training/guard_on_devices.py

Prints one JSON object: per case what was skipped, whether every bit of every device's part was
kept, and what goes between devices with the guard and without.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tiny_run  # noqa: E402

POISONS = {251: ("values", np.nan), 252: ("values", np.inf), 253: ("values", 1e3),
           254: ("gradient", np.nan), 255: ("gradient", np.inf)}
"""Token id -> what it is multiplied by: the last hidden state there, or its gradient."""
CASES = {"nan in a gradient, data": (254, (8, 1, 1, 1)),
         "nan in the loss, all axes": (251, (1, 2, 2, 2))}


class Poisoned:
    """A model that tokens of `POISONS` set free what they name in."""

    def __init__(self, model: Any):
        self.model = model

    def apply(self, variables: Any, batch: Any, *state: Any, **kwargs: Any) -> Any:
        hidden, *rest = self.model.apply(variables, batch, *state, **kwargs)
        values, gradient = (self._factor(batch.tokens_BT, of) for of in ("values", "gradient"))
        return _in_the_gradient(hidden * values, gradient), *rest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    @staticmethod
    def _factor(tokens_BT: jax.Array, of: str) -> jax.Array:
        factor = jnp.ones(tokens_BT.shape)
        for token, (where, value) in POISONS.items():
            factor = jnp.where(tokens_BT == token, value if where == of else 1.0, factor)
        return factor[..., None]


@jax.custom_vjp
def _in_the_gradient(hidden: jax.Array, factor: jax.Array) -> jax.Array:
    return hidden


_in_the_gradient.defvjp(lambda hidden, factor: (hidden, factor),
                        lambda factor, g: (g * factor.astype(g.dtype), None))


def measure(poison: int, axes: tuple[int, int, int, int]) -> dict[str, Any]:
    """A good step, one that a single device spoils, and a good one."""
    from hippocampus.config import MeshConfig
    from hippocampus.data.batches import Batch
    from hippocampus.devices import resolve
    from hippocampus.models.build_model import build_model
    from hippocampus.training import sharding
    from hippocampus.training import step as step_module
    from hippocampus.training.optimizer import build_optimizer
    from hippocampus.training.step import jit_train_step, sharded_init, train_step

    config, _ = resolve(tiny_run.config())
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    mesh = sharding.make_mesh(MeshConfig(0, *axes))
    make, like, shardings = sharded_init(model, optimizer, config, mesh)

    def batch(seed: int, bad: bool) -> Batch:
        ids = np.random.default_rng(seed).integers(0, 250, (8, 17)).astype(np.int32)
        if bad:
            ids[5, 3] = poison  # row 5 lies on one device of the data axis
        return sharding.to_devices(
            Batch(ids[:, :-1], ids[:, 1:], np.ones((8, 16), np.float32)), mesh)

    def digest(state: Any) -> str:
        """Of every device's part."""
        return tiny_run.digest([[shard.data for shard in leaf.addressable_shards] for leaf in
                                jax.tree.leaves((state.params, state.ema, state.opt_state))])

    def compile_step() -> Any:
        step = train_step(Poisoned(model), optimizer, config)
        return jit_train_step(step, mesh, shardings).lower(like, batch(0, False)).compile()

    compiled = compile_step()
    with (mock.patch.object(step_module, "broken_tokens", lambda *_: jnp.zeros(())),
          mock.patch.object(step_module, "judge", lambda guard, *_: (jnp.zeros((), bool), guard))):
        without = collectives(compile_step().as_text())
    states, counts = [], []
    state = make()
    for seed, bad in enumerate((False, True, False)):
        state, _ = compiled(state, batch(seed, bad))
        states.append(digest(state))
        counts.append([int(state.step), *(int(state.guard[n]) for n in ("skipped", "in_a_row"))])
    copies = [int(shard.data) for shard in state.guard["skipped"].addressable_shards]
    text = compiled.as_text()
    return {"counts": counts, "kept": states[0] == states[1], "moved": states[1] != states[2],
            "copies": [len(copies), len(set(copies))], "collectives": collectives(text),
            "collectives without": without,
            "to the host": len(re.findall(r"callback| (?:outfeed|send)\(", text))}


def collectives(text: str) -> dict[str, int]:
    """What a program's collectives carry: every array, and how many of them carry numbers too.

    XLA decides anew in every program which arrays share a collective.
    """
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    carried: Counter[str] = Counter()
    for shapes, kind in re.findall(rf" = (.*?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        carried.update(f"{kind} {dtype}[{shape}]" for dtype, shape in arrays if shape)
        carried[f"{kind} with numbers"] += any(not shape for _, shape in arrays)
    return dict(carried)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: measure(*case) for name, case in CASES.items()}))
