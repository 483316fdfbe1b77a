"""Writes golden_step.json: the numbers of three training steps from a fixed seed.

Run it when a change is *meant* to move the numbers (initialisation, loss, optimizer, model), look
at the difference, and commit the file with the reason:

    python tests/training/make_golden_step.py
"""

import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

TABLE = Path(__file__).with_name("golden_step.json")


def measure() -> dict[str, float]:
    """Metrics of the first step, the loss of the third, and norms of what three steps made."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import tiny_run

    from hippocampus.data.batches import ShuffledWindows
    from hippocampus.devices import resolve
    from hippocampus.models.build_model import build_model
    from hippocampus.training import sharding
    from hippocampus.training.optimizer import build_optimizer
    from hippocampus.training.step import jit_train_step, sharded_init, train_step

    config, _ = resolve(tiny_run.config(
        model__paths=("ssm", "hopfield", "attention"), model__hopfield__depth_schedule=(2,),
        model__segments__train=2, model__segments__weights=(0.3, 1.0),
        model__compute_dtype="float32", model__attention__backend="xla",
        model__ssm__backend="sequential", loss__backend="full", loss__z_weight=1e-4,
        loss__label_smoothing=0.1, train__seed=7, model__vocab_size=64))
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
    make, _, shardings = sharded_init(model, optimizer, config, mesh)
    state = make()
    step = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    ids = (np.arange(2000) * 7919 % 6101 % 64).astype(np.int32)
    batches = ShuffledWindows(ids, config.data.context, config.train.batch_size, config.train.seed)
    first = jax.tree.map(jnp.copy, state.params)
    drawn = [leaf for path, leaf in jax.tree.leaves_with_path(first)
             if jax.tree_util.keystr(path).endswith("kernel']")]
    found = {"first/embedding_norm": optax.tree.norm(first["embedding"]),
             "first/kernels_norm": optax.tree.norm(drawn)}
    rows = []
    for n in range(3):
        batch = jax.tree.map(jnp.asarray, batches.batch(n))
        state, metrics = step(state, batch)
        rows.append(metrics)
    for name in ("train/loss", "train/total", "train/grad_norm", "train/nll_segment_1", "train/z",
                 "train/smoothing", "train/learning_rate", "mixer/entropy", "hopfield/depth"):
        found[name] = rows[0][name]
    found["third/train/loss"] = rows[2]["train/loss"]
    found["third/grad_norm"] = rows[2]["train/grad_norm"]
    for name, tree in (("params", state.params), ("ema", state.ema)):
        moved = jax.tree.map(jnp.subtract, tree, first)
        found[f"third/{name}_moved"] = optax.tree.norm(moved)
    return {name: float(value) for name, value in found.items()}


def machine() -> dict[str, Any]:
    """What has to be the same for the numbers to be the same to the last bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    first = {key.strip(): value.strip() for key, _, value in
             (line.partition(":") for line in reversed(lines)) if key.strip()}
    return {"jaxlib": metadata.version("jaxlib"), "processor": first.get("model name", ""),
            "instructions": hashlib.sha256(first.get("flags", "").encode()).hexdigest()[:12],
            "cores": os.cpu_count(), "xla_flags": os.environ.get("XLA_FLAGS", "")}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    TABLE.write_text(json.dumps({"machine": machine(), "metrics": measure()}, indent=2) + "\n")
    sys.stdout.write(TABLE.read_text())
