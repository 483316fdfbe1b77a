"""Orbax behind one file: numbered steps, retention, and loading only what is asked for."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from orbax.checkpoint import options as orbax_options
from orbax.checkpoint import v1 as ocp

from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError

METRIC = "eval/loss"
"""The metric, lower is better, that the best step is chosen by."""

_keep = ocp.training.preservation_policies


class Checkpoints:
    """The `steps/` folder of a run. Use as a context manager: leaving waits for pending saves.

    A step holds named trees ("params", "ema", "optimizer", "progress"), so that sampling reads
    parameters without the optimizer.
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None):
        """Opens the folder.

        Args:
          folder: created if missing when `config` is given; else only read.
          config: retention; None = nothing is ever deleted.
        """
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save there
        policy = None
        if config is not None:
            kept: list[Any] = [_keep.LatestN(config.keep_latest)]
            if config.keep_best:
                kept.append(_keep.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC], reverse=True,
                    n=config.keep_best, keep_checkpoints_without_metrics=False))
            if config.keep_every_steps:
                kept.append(_keep.EveryNSteps(config.keep_every_steps))
            policy = _keep.AnyPreservationPolicy(kept)
        context = ocp.Context()
        # By default an empty folder named like a step would count as one.
        context.atomicity.mode = orbax_options.AtomicityMode.COMMIT_FILE
        self._pending: Any = None
        self._orbax = ocp.training.Checkpointer(
            folder.absolute(), context=context, preservation_policy=policy,
            cleanup_tmp_directories=config is not None,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.wait()
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """Saved steps, oldest first."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest eval/loss; the newest if none was evaluated."""
        scored = {step: loss for step, loss in self.losses().items() if loss is not None}
        return min(scored, key=lambda step: (scored[step], step)) if scored else self.latest

    def losses(self) -> dict[int, float | None]:
        """eval/loss of every saved step; None where it was not evaluated."""
        return {c.step: (c.metrics or {}).get(METRIC) for c in self._orbax.checkpoints}

    def save(self, step: int, trees: dict[str, Any], eval_loss: float | None) -> None:
        """Starts a save; device buffers may be donated as soon as this returns.

        Raises:
          CheckpointError: the save before this one failed, or Orbax refused this one.
        """
        self.wait()
        metrics = None if eval_loss is None else {METRIC: eval_loss}
        with _explained(f"step {step} could not be saved"):
            self._pending = self._orbax.save_checkpointables_async(
                step, trees, metrics=metrics, force=True)
        if self._pending is None:
            raise CheckpointError(f"step {step} was not saved: step {self.latest} is there already",
                                  "is another process training in this folder?")

    def wait(self) -> None:
        """Blocks until the pending save is on disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with _explained("a checkpoint could not be written"):
                pending.result()

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Loads the named trees of a step.

        Args:
          step: a saved step.
          like: name -> tree of `jax.ShapeDtypeStruct` with the shardings to load onto.

        Raises:
          CheckpointError: the step is damaged, or of other shapes.
        """
        with _explained(f"step {step} could not be restored"):
            return self._orbax.load_checkpointables(step, like)


def abstract(tree: Any) -> Any:
    """The tree as `jax.ShapeDtypeStruct`s that keep the arrays' shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns Orbax's errors into one line; the useful message is often in the cause."""
    try:
        yield
    except (ValueError, KeyError, OSError, RuntimeError, TypeError) as error:
        cause = error.__cause__ or error
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise CheckpointError(f"{what}: {first_line[:300]}",
                              "--debug shows the whole error") from error
