"""Numbered steps: what is saved, kept, checked, and loaded.

Orbax writes and reads one step (`orbax_step`). Which steps there are, which of them are good and
which go, is decided here: a full disk, a flipped bit or a kill may cost a save, never the run.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from hippocampus import distributed
from hippocampus.config import CheckpointConfig
from hippocampus.errors import CheckpointError, HippocampusError
from hippocampus.runs import step_folders
from hippocampus.runs.manifest import has_manifest, write_manifest
from hippocampus.runs.orbax_step import OrbaxStep, OtherTrees, reason
from hippocampus.runs.step_folders import DAMAGED, METRIC

FAILURES_IN_A_ROW = 3
"""So many saves that failed one after the other end the run: it is not safe any more."""


@dataclass(frozen=True)
class _Pending:
    """A save that is being written; its result is what a person should know."""

    step: int
    eval_loss: float | None
    leaving: frozenset[int]
    result: Future[list[str]]


class Checkpoints:
    """The `steps/` folder of a run. Use as a context manager: leaving waits for pending saves.

    A step holds named trees ("params", "ema", "optimizer", "progress"), so that sampling reads
    parameters without the optimizer. With several processes every one of them makes the same
    calls, except of the properties, `losses` and `best_good`.
    """

    def __init__(self, folder: Path, config: CheckpointConfig | None = None,
                 say: Callable[[str], None] | None = None, run_file: Path | None = None):
        """Opens the folder.

        Args:
          folder: created if missing when `config` is given; else only read.
          config: retention, for the one that trains: what a killed save left is removed;
            None = nothing is ever deleted.
          say: called with a line that a person should see, on every process; default: silent.
          run_file: a file that shows that the run is still here. Where it was moved away or
            unmounted, writers make folders anew: without this file what they wrote is no step.

        Raises:
          CheckpointError: the folder cannot be written.
        """
        self._folder, self._config = folder.absolute(), config
        self._say = say or (lambda line: None)
        self._run_file = run_file.absolute() if run_file is not None else None
        self._orbax = OrbaxStep()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._failures = 0
        self._losses: dict[int, float | None] = {}
        if config is None:
            self._losses = step_folders.committed(self._folder)
            return
        with self._on_first(f"{self._folder} cannot be written"):
            if distributed.is_first():
                self._folder.mkdir(parents=True, exist_ok=True)
                step_folders.clean(self._folder)
                self._losses = step_folders.committed(self._folder)
        self._losses = dict(distributed.from_first(list(self._losses.items())))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
            elif self._pending is not None:  # the other processes may be elsewhere: no agreement
                self._settle(self._pending, _outcome(self._pending.result), fatal=False)
        finally:
            self._thread.shutdown()

    @property
    def steps(self) -> list[int]:
        """Committed steps, oldest first; not one that is being written."""
        return sorted(self._losses)

    @property
    def latest(self) -> int | None:
        """The newest step, or None."""
        return max(self._losses, default=None)

    @property
    def best(self) -> int | None:
        """The step with the lowest eval/loss; the newest if none was evaluated."""
        return next(iter(step_folders.ranked(self._losses)), self.latest)

    def losses(self) -> dict[int, float | None]:
        """eval/loss of every committed step; None where it was not evaluated."""
        return dict(sorted(self._losses.items()))

    def save(self, step: int, trees: dict[str, Any], eval_loss: float | None) -> bool:
        """Starts a save; device buffers may be donated as soon as this returns.

        Returns:
          False: it was given up, for want of space for example, which was said; what an earlier
          save died of is said too, and does not keep this one from starting.

        Raises:
          CheckpointError: the step is there already.
          HippocampusError: the third save in a row failed, or one of several processes failed in
            the middle of a save.
        """
        self.wait()
        if step in self._losses:
            raise CheckpointError(f"step {step} was not saved: it is there already",
                                  "is another process training in this folder?")
        size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(trees))
        problem = distributed.from_first(self._make_room(step, size)
                                         if distributed.is_first() else None)
        if problem is None:
            problem = self._start(step, trees, eval_loss)
        if problem is not None:
            self._give_up(step, problem)
        return problem is None

    def score(self, step: int, eval_loss: float) -> None:
        """Adds the eval/loss of a saved step that was evaluated only later, as after a stop.

        Raises:
          CheckpointError: there is no such step, or it cannot be written to.
        """
        self.wait()
        if step not in self._losses:
            raise CheckpointError(f"there is no step {step} to score", self._saved())
        with self._on_first(f"the loss of step {step} could not be written"):
            if distributed.is_first():
                step_folders.score(self._folder / str(step), eval_loss)
        self._losses[step] = eval_loss

    def wait(self) -> None:
        """Blocks until the pending save and its manifest are on disk, or its failure is said.

        Raises:
          HippocampusError: the third save in a row failed.
        """
        if self._pending is not None:
            self._settle(self._pending, _outcome(self._pending.result))

    def restore(self, step: int, like: dict[str, Any]) -> dict[str, Any]:
        """Loads the named trees of a step.

        Args:
          step: a saved step.
          like: name -> tree of `jax.ShapeDtypeStruct` with the shardings to load onto.

        Raises:
          CheckpointError: the step is damaged, or of other shapes or types.
        """
        what = f"step {step} could not be restored"
        if step not in self._losses:
            raise CheckpointError(f"{what}: it is not there", self._saved())
        return self._orbax.read(self._folder / str(step), like, what)

    def restore_newest(self, like: dict[str, Any], *, before: int | None = None,
                       optional: Collection[str] = ()) -> tuple[int, dict[str, Any]] | None:
        """Loads the newest step that is good; what is damaged is said, renamed and kept.

        Args:
          like: see `restore`.
          before: only steps with a smaller number.
          optional: names in `like` that a step of an older version may lack.

        Returns:
          The step and its trees; None where there is no step at all.

        Raises:
          CheckpointError: there are steps, but none is good; or of other shapes or types.
        """
        self.wait()
        there = distributed.from_first(self._candidates())
        steps = [step for step in reversed(there) if before is None or step < before]
        for step, older in zip(steps, [*steps[1:], None], strict=False):
            why, trees = self._try(step, like, optional)
            if why is None:
                return step, trees
            then = f"using {older}" if older is not None else "there is none before it"
            self._say(f"checkpoint {step} is damaged ({why}); {then}")
            self._rename([step], DAMAGED)
        kept = distributed.from_first(step_folders.damaged(self._folder))
        if steps or (kept and not there and before is None):
            raise CheckpointError(
                f"no checkpoint in {self._folder} is good: {', '.join(kept)}",
                "put a copy of a good one there; or remove these to begin again, or choose "
                "another --workdir")
        return None

    def best_good(self, step: int | None = None, *,
                  trees: Collection[str] | None = None) -> int | None:
        """The step that a reader should take; nothing is renamed.

        Args:
          step: the one that was asked for; None = the best whose digests are right.
          trees: those that will be read; None = all.

        Returns:
          The step; None where there is none at all.

        Raises:
          CheckpointError: the step asked for is not there or damaged, or no step is good.
        """
        if step is not None:
            if step not in self._losses:
                raise CheckpointError(f"{self._folder} has no step {step}", self._saved())
            if why := step_folders.damage(self._folder / str(step), trees):
                raise CheckpointError(f"checkpoint {step} is damaged ({why})", self._saved())
            return step
        best = step_folders.ranked(self._losses)
        order = best + [step for step in reversed(self.steps) if step not in best]
        for chosen, next_best in zip(order, [*order[1:], None], strict=False):
            why = step_folders.damage(self._folder / str(chosen), trees)
            if why is None:
                return chosen
            then = f"using {next_best}" if next_best is not None else "there is no other"
            self._say(f"checkpoint {chosen} is damaged ({why}); {then}")
        if order:
            raise CheckpointError(f"no checkpoint in {self._folder} is good",
                                  "put a copy of a good one there")
        return None

    def set_aside(self, after: int, word: str) -> None:
        """Renames every step behind `after` to `<n>.<word>`, so that it can be saved again."""
        self.wait()
        there = distributed.from_first(self._candidates())
        self._rename([step for step in there if step > after], word)

    def _saved(self) -> str:
        return f"saved: {', '.join(map(str, self.steps)) or 'none'}"

    def _candidates(self) -> list[int]:
        """Steps that are or were whole, oldest first."""
        return [step for step, path in step_folders.numbered(self._folder).items()
                if step_folders.was_committed(path)]

    def _rename(self, steps: list[int], word: str) -> None:
        with self._on_first("a checkpoint could not be renamed"):
            if distributed.is_first():
                for step in steps:
                    step_folders.set_aside(self._folder / str(step), word)
        for step in steps:
            self._losses.pop(step, None)

    def _try(self, step: int, like: dict[str, Any],
             optional: Collection[str]) -> tuple[str | None, dict[str, Any]]:
        """The trees of a step, or what is wrong with it: alike on all processes."""
        path = self._folder / str(step)
        first = distributed.is_first()
        why, checked, missing = distributed.from_first([
            step_folders.damage(path) if first else None, has_manifest(path),
            [name for name in like if not (path / name).is_dir()]])
        lacking = [name for name in missing if name not in optional]
        if why is None and lacking and not checked:  # a deletion that was killed half way
            why = f"{lacking[0]} is missing"
        if why is not None:
            return why, {}
        trees: dict[str, Any] = {}
        try:
            trees = self.restore(step, {name: tree for name, tree in like.items()
                                        if name not in missing or name in lacking})
        except OtherTrees:
            raise  # of another config: nothing is damaged
        except CheckpointError as error:
            why = error.message.partition(": ")[2]
        why = next(filter(None, distributed.gather(why or "")), None)
        if why is None and not checked:
            self._say(f"note: checkpoint {step} has no digests to check it by; it could be read")
        return why, trees

    def _make_room(self, step: int, size: int) -> str | None:
        """On process 0: what keeps a step from being written, once its leftovers are gone."""
        step_folders.clean(self._folder)
        if (self._folder / str(step)).exists():
            return f"{self._folder / str(step)} is in the way"
        return step_folders.lack_of_space(self._folder, size)

    def _start(self, step: int, trees: dict[str, Any], eval_loss: float | None) -> str | None:
        losses = {**self._losses, step: eval_loss}
        leaving = (frozenset() if self._config is None
                   else frozenset(losses) - step_folders.kept(losses, self._config))
        try:
            response = self._orbax.write(self._folder / str(step), trees,
                                         None if eval_loss is None else {METRIC: eval_loss})
        except Exception as error:  # Orbax raises whatever the disk makes it raise
            self._end_of_several(step, reason(error))
            return reason(error)
        self._pending = _Pending(step, eval_loss, leaving, self._thread.submit(
            self._finish, step, leaving, response))
        return None

    def _finish(self, step: int, leaving: frozenset[int], response: Any) -> list[str]:
        """In the thread of the save: the commit, the manifest, and only then older steps go."""
        response.result()
        notes: list[str] = []
        if distributed.is_first():
            if self._is_gone():
                step_folders.withdraw(self._folder / str(step))
                raise FileNotFoundError(errno.ENOENT, "gone meanwhile", str(self._run_file))
            try:
                write_manifest(self._folder / str(step))
            except OSError as error:
                notes.append(f"warning: step {step} has no digests: {reason(error)}")
            for old in sorted(leaving):
                try:
                    step_folders.delete(self._folder / str(old))
                except OSError as error:
                    notes.append(f"warning: step {old} could not be deleted: {reason(error)}")
        return notes

    def _settle(self, pending: _Pending, problem: str, fatal: bool = True) -> None:
        self._pending = None
        if problem:
            if fatal:
                self._end_of_several(pending.step, problem)
            self._give_up(pending.step, problem, fatal)
            return
        for line in pending.result.result():
            self._say(line)
        self._failures = 0
        self._losses[pending.step] = pending.eval_loss
        for old in pending.leaving:
            self._losses.pop(old, None)

    def _end_of_several(self, step: int, problem: str) -> None:
        """The others wait for this process in a barrier of Orbax: no agreement is possible."""
        if distributed.is_several():
            raise HippocampusError(f"step {step} could not be saved: {problem}",
                                   "start all processes again: what was saved before is whole")

    def _give_up(self, step: int, problem: str, fatal: bool = True) -> None:
        self._failures += 1
        if distributed.is_first():
            step_folders.clean(self._folder)
            if self._is_gone():
                step_folders.remove_empty(self._folder)
        if fatal and self._failures >= FAILURES_IN_A_ROW:
            raise HippocampusError(f"{self._failures} saves in a row failed, of step {step} "
                                   f"because: {problem}",
                                   "what was saved before is whole: the run can go on from it")
        self._say(f"warning: step {step} was not saved: {problem}")

    def _is_gone(self) -> bool:
        return self._run_file is not None and not self._run_file.is_file()

    @contextlib.contextmanager
    def _on_first(self, what: str) -> Iterator[None]:
        """Work of process 0 with files; when it fails, every process says why."""
        problem = None
        try:
            yield
        except (OSError, ValueError) as error:
            problem = reason(error)
        problem = distributed.from_first(problem)
        if problem is not None:
            raise CheckpointError(f"{what}: {problem}", "is the disk there, and writable?")


def abstract(tree: Any) -> Any:
    """The tree as `jax.ShapeDtypeStruct`s that keep the arrays' shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
        tree)


def _outcome(result: Future[list[str]]) -> str:
    """What a save died of; "" when it is on disk."""
    error = result.exception()
    return "" if error is None else reason(error)
