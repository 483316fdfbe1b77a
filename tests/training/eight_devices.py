"""Trains on meshes of eight virtual devices and on one device; run in a process of its own.

    python tests/training/eight_devices.py '{"<name>": ["<model>", [data, fsdp, tensor, sequence]]}'

Prints one JSON object: per name the losses, and how far the moments and parameters are from those
of one device.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import buu_run  # noqa: E402
import chopt_run  # noqa: E402
import quick_xla  # noqa: E402
import tiny_run  # noqa: E402

STEPS = 3
# A large epsilon, because Adam's root would blow up the last bits of tiny gradients.
COMMON: dict[str, Any] = {
    "train__steps": 12, "optimizer__epsilon": 1.0, "optimizer__learning_rate": 0.3,
    "model__compute_dtype": "float32", "model__paths": ("ssm", "hopfield", "attention"),
    "model__hopfield__depth_schedule": (2,), "loss__backend": "chunked"}
_LOOPS: dict[str, Any] = {
    "model__paths": ("attention",), "loss__backend": "full", "model__remat": "full",
    "train__grad_accumulation": 2}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {**COMMON, "model__paths": ("attention",), "loss__backend": "full"},
    "gathered_once": {**COMMON, **_LOOPS},
    "gathered_where_used": {**COMMON, **_LOOPS, "mesh__gather": "use"},
    "everything": {
        **COMMON, "model__hopfield__patterns": "both", "model__hopfield__n_slots": 8,
        "model__segments__train": 2, "model__segments__weights": (0.3, 1.0),
        "model__segments__feedback": True, "model__tie_embeddings": False,
        "model__position": "learned", "loss__z_weight": 1e-3, "loss__label_smoothing": 0.1,
        "model__attention__n_kv_heads": 1, "loss__rectified_flow__depth_weight": 0.1,
        "ema__decay": 0.9},
    "packed": {
        **COMMON, "model__n_layers": 2, "model__scan_layers": True, "model__remat": "dots",
        "model__ssm__kind": "diagonal", "model__hopfield__rope": True, "model__dropout": 0.1,
        "model__attention__window": 5, "train__grad_accumulation": 2,
        "model__embedding_width": 8, "model__token_noise": 0.1},
    "s6": {**COMMON, "model__paths": ("ssm",), "model__ssm__kind": "s6"},
    "ssd": {**COMMON, "model__paths": ("ssm",), "model__ssm__kind": "ssd",
            "model__ssm__expansion": 2.0, "model__ssm__head_width": 8},
}


_OF_HYBRID = ("model__paths", "model__hopfield__depth_schedule")
_EQUILIBRIUM: dict[str, Any] = {
    **{name: value for name, value in COMMON.items() if name not in _OF_HYBRID},
    "model__family": "equilibrium", "model__solver__tol_fixedpoint": 0.0,
    "model__solver__max_iterations": 3, "loss__equilibrium__energy_weight": 0.1}
MODELS |= {
    # What compiles fast; below is everything.
    "equilibrium": {
        **_EQUILIBRIUM, "model__solver__method": "picard",
        "model__cell__parts": ("hopfield", "mlp"), "data__order": "streams",
        "model__solver__warm_start": "stream"},
    "equilibrium_packed": {
        **_EQUILIBRIUM, "model__tie_embeddings": False, "model__hopfield__patterns": "both",
        "model__n_layers": 2, "model__scan_layers": True, "model__remat": "full",
        "model__dropout": 0.1, "train__grad_accumulation": 2, "ema__decay": 0.9,
        "loss__equilibrium__jacobian_weight": 0.1, "loss__equilibrium__jacobian_chance": 1.0,
        "loss__equilibrium__contraction_weight": 0.1, "loss__equilibrium__contraction_target": 0.1},
    "chopt": {
        "train__steps": 12, "optimizer__epsilon": 1.0, "optimizer__learning_rate": 0.3,
        "model__compute_dtype": "float32", "train__batch_size": 8, "ema__decay": 0.9},
    "buu_packed": {  # with open gates, so that everything has a gradient at once
        "model__adapters__mix": "interpolate", "model__adapters__gate_bias": 0.0,
        "train__steps": 12, "optimizer__epsilon": 1.0, "optimizer__learning_rate": 0.3,
        "model__compute_dtype": "float32", "train__batch_size": 8, "ema__decay": 0.9},
}
MAKERS = {"chopt": chopt_run.config, "buu_packed": buu_run.config}
"""What makes the config of a model, where `tiny_run` does not."""


def batch(config: Any, step: int, packed: bool) -> Any:
    """A global batch of made-up ids; packed, with up to three documents a row."""
    import numpy as np

    from hippocampus.data.batches import Batch
    from hippocampus.data.story_rows import ChunkedBatch

    draw = np.random.default_rng(step)
    shape = (config.train.batch_size, config.data.context)
    tokens, targets = draw.integers(0, 256, (2, *shape)).astype(np.int32)
    weight = draw.integers(0, 2, shape).astype(np.float32)
    if config.model.family == "chopt":
        kinds = draw.integers(0, 3, (shape[0], shape[1] // config.model.chunk))
        return ChunkedBatch(tokens, targets, weight, reset_Bn=(kinds == 0) | (step == 0),
                            question_Bn=kinds == 1, story_Bn=kinds.astype(np.int32))
    ids = np.sort(draw.integers(1, 4, shape), axis=1).astype(np.int32) if packed else None
    reset = None if config.data.order != "streams" else np.full(shape[0], step == 0)
    return Batch(tokens, targets, weight, document_ids_BT=ids, reset_B=reset)


@functools.cache
def first_state(name: str) -> Any:
    """The state before the first step, on the host: made once for all meshes."""
    import jax

    from hippocampus.training import sharding
    from hippocampus.training.opening import from_files
    from hippocampus.training.step import sharded_init

    config, model, optimizer = parts(name)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    make, like, _ = sharded_init(model, optimizer, config, mesh)
    return from_files(config, model, like, make, True)


@functools.cache
def parts(name: str) -> tuple[Any, Any, Any]:
    """Config, model and optimizer."""
    from hippocampus.devices import resolve
    from hippocampus.models.build_model import build_model
    from hippocampus.training.opening import with_architecture
    from hippocampus.training.optimizer import build_optimizer

    make = MAKERS.get(name, tiny_run.config)
    config, _ = resolve(with_architecture(make(**MODELS[name])))
    return config, build_model(config), build_optimizer(config.optimizer, config.train.steps)


@functools.cache
def train(name: str, axes: tuple[int, int, int, int]) -> tuple[list, Any]:
    """Losses and gradient norms of some steps; the last state, a device's shape of a batch, and
    how often a step gathers.
    """
    import jax
    import numpy as np

    from hippocampus.config import MeshConfig
    from hippocampus.training import sharding
    from hippocampus.training.step import jit_train_step, sharded_init, train_step

    config, model, optimizer = parts(name)
    mesh = sharding.make_mesh(MeshConfig(0, *axes), jax.devices()[:int(np.prod(axes))])
    _, _, shardings = sharded_init(model, optimizer, config, mesh)
    # A copy: the step donates its buffers.
    state = jax.device_put(jax.tree.map(jax.numpy.copy, first_state(name)), shardings)
    rows = []
    step = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    for n in range(STEPS):
        placed = sharding.to_devices(batch(config, n, name.endswith("packed")), mesh)
        if not n:
            step = step.lower(state, placed).compile()
        state, metrics = step(state, placed)
        rows.append([float(metrics[m]) for m in ("train/loss", "train/grad_norm")])
    shard = placed.tokens_BT.addressable_shards[0].data.shape
    return rows, (state, shard, step.as_text().count(" all-gather("))


def compare(name: str, axes: list[int]) -> dict[str, Any]:
    """A mesh against one device: relative distance per leaf, and shares of memory per device."""
    import jax
    import numpy as np

    from hippocampus.training.sharding import path_name

    losses, (state, shard, gathers) = train(name, tuple(axes))
    wanted, (one, *_) = train(name, (1, 1, 1, 1))
    far, shards = {}, {}
    for part, tree, other in (("params", state.params, one.params), ("ema", state.ema, one.ema),
                              ("carried", state.carried, one.carried),
                              ("mu", state.opt_state[1][0].mu, one.opt_state[1][0].mu)):
        largest = max([0.0, *(float(abs(np.asarray(leaf)).max())
                              for leaf in jax.tree.leaves(other))])
        pairs = zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True)
        for (path, a), b in pairs:
            a_, b_ = np.asarray(a, np.float64), np.asarray(b, np.float64)
            size = float(abs(b_).max()) + 1e-3 * largest
            far[f"{part}/{path_name(path)}"] = float(abs(a_ - b_).max()) / size
            shards[f"{part}/{path_name(path)}"] = [a.size, a.addressable_shards[0].data.size]
    worst = max(far, key=lambda path: far[path])
    return {"losses": losses, "wanted": wanted, "worst": [worst, far[worst]], "shard": shard,
            "shards": shards, "gathers": gathers}


@functools.cache
def on_eight_devices(script: Path, cases: str) -> tuple[dict[str, Any], str]:
    """Runs a script like this one; returns what it printed, and its stderr."""
    env = {**tiny_run.environment(), "XLA_FLAGS": " ".join(
        ("--xla_force_host_platform_device_count=8", *quick_xla.FLAGS))}
    done = subprocess.run([sys.executable, str(script), cases], env=env, text=True,
                          capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout), done.stderr


if __name__ == "__main__":
    sys.stdout.write(json.dumps({
        name: compare(*case) for name, case in json.loads(sys.argv[1]).items()}))
