"""What saving costs: the time of training steps with a save every so often, beside none.

    python benchmarks/checkpoints.py --config=configs/wt103_bpe.py --steps=400
    python benchmarks/checkpoints.py --config=configs/wt103_bpe.py --steps=50 --every=100
    python benchmarks/checkpoints.py --config=configs/wt103_bpe.py --steps=50 --every=100 \
        --deterministic

Batches are random ids. Blocks of `--steps` steps with saves every `checkpoint.every_steps` (or
`--every`) and blocks without are timed in turn, `--repeats` times each after a warm-up, and the
medians compared. `blocking` is the time until the loop goes on after a save was asked for; the rest
of a save happens behind the steps that follow, and what it takes from them is in the blocks' times.
An interval longer than a block leaves the steps alone; --deterministic times those that
`train.deterministic` gives, to be compared with a run without it on the same machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hippocampus.config import CheckpointConfig, Config
from hippocampus.config_files import load_config
from hippocampus.data.batches import Batch
from hippocampus.devices import prepare_deterministic, resolve
from hippocampus.models.build_model import build_model, count_parameters
from hippocampus.runs.checkpoints import Checkpoints
from hippocampus.training import sharding
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.state import TrainState
from hippocampus.training.step import jit_train_step, sharded_init, train_step

WARM_UP = 5


def main() -> None:
    """Prints the results, one a line, or as one JSON object with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/shakespeare.py:3.5m")
    parser.add_argument("--batch_size", type=int, default=0, help="default: the config's")
    parser.add_argument("--steps", type=int, default=0, help="of a block; default: two saves'")
    parser.add_argument("--every", type=int, default=0, help="default: the config's interval")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workdir", help="where to save to; default: a temporary folder")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    overrides: dict[str, Any] = {"train.deterministic": given.deterministic}
    if given.batch_size:
        overrides["train.batch_size"] = given.batch_size
    if given.deterministic:
        prepare_deterministic()
    config, _ = resolve(load_config(given.config, overrides))
    every = given.every or config.checkpoint.every_steps
    trainer = Trainer(config)
    with tempfile.TemporaryDirectory(dir=given.workdir) as folder:
        results = compare(trainer, Path(folder), given.steps or 2 * every, every, given.repeats)
    device = jax.devices()[0].device_kind
    results = {"device": device, "parameters": count_parameters(trainer.model),
               "batch_size": config.train.batch_size,
               "deterministic": given.deterministic, **results}
    if given.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:<28} {value:,.4g}" if isinstance(value, float) else f"{name:<28} {value}")


class Trainer:
    """A state that steps; the host is never more than a step ahead of the device."""

    def __init__(self, config: Config):
        mesh = sharding.make_mesh(config.mesh)
        self.model = build_model(config)
        optimizer = build_optimizer(config.optimizer, config.train.steps)
        make, _, shardings = sharded_init(self.model, optimizer, config, mesh)
        self.step = jit_train_step(train_step(self.model, optimizer, config), mesh, shardings)
        self.state: TrainState = make()
        draw = np.random.default_rng(0)
        shape = (config.train.batch_size, config.data.context)
        ids = draw.integers(0, config.model.vocab_size, shape).astype(np.int32)
        self.batch = sharding.to_devices(Batch(ids, ids, np.ones(shape, np.float32)), mesh)

    def run(self, steps: int, after: Any = lambda step: None) -> float:
        """Seconds of so many steps, with something done after each; ends when the device does."""
        start, before = time.perf_counter(), None
        for step in range(1, steps + 1):
            self.state, metrics = self.step(self.state, self.batch)
            if before is not None:
                jax.block_until_ready(before)
            before = metrics
            after(step)
        jax.block_until_ready(self.state)
        return time.perf_counter() - start


def compare(trainer: Trainer, folder: Path, steps: int, every: int,
            repeats: int) -> dict[str, Any]:
    """Blocks of steps with saves and without, in turn."""
    blocking: list[float] = []
    saved = 0
    keep = dataclasses.replace(CheckpointConfig(), keep_best=0)
    with Checkpoints(folder / "steps", keep, print) as checkpoints:
        def save(step: int) -> None:
            nonlocal saved
            if step % every == 0:
                start = time.perf_counter()
                saved += 1
                checkpoints.save(saved, trainer.state.trees(), None)
                blocking.append(time.perf_counter() - start)

        trainer.run(WARM_UP, lambda step: checkpoints.save(10**6, trainer.state.trees(), None)
                    if step == WARM_UP else None)
        checkpoints.wait()
        with_saves, without = [], []
        for _ in range(repeats):
            without.append(trainer.run(steps))
            with_saves.append(trainer.run(steps, save))
            start = time.perf_counter()
            checkpoints.wait()
            tail = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (folder / "steps").rglob("*") if p.is_file())
        whole = statistics.median(with_saves) / statistics.median(without) - 1
    return {"step_ms": 1e3 * statistics.median(without) / steps, "steps": steps, "every": every,
            "checkpoint_gib": size / len(list((folder / "steps").iterdir())) / 2**30,
            "blocking_ms": 1e3 * statistics.median(blocking or [0.0]),
            "blocking_ms_most": 1e3 * max(blocking, default=0.0),
            "blocking_share": sum(blocking) / sum(with_saves),
            "cost_of_saving": whole, "after_the_last_step_s": tail}


if __name__ == "__main__":
    main()
