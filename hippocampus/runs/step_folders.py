"""The folders of `steps/`: which of them count, which are kept, and how one goes away.

    <n>            a step; whole when it holds commit_success.txt, which Orbax writes last
    <n>.damaged    a step that was found damaged; kept for a person to look at
    <n>.deleting   a step on its way out
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hippocampus.config import CheckpointConfig
from hippocampus.files import write_atomically
from hippocampus.runs.manifest import check_manifest, extend_manifest, has_manifest

METRIC = "eval/loss"
"""The metric, lower is better, that the best step is chosen by."""
COMMITTED = "commit_success.txt"
DAMAGED = "damaged"

_DELETING = "deleting"
_LATER_LOSS = "eval_loss.json"
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
_ORBAX_TEMPORARY = "orbax-checkpoint-tmp"


def numbered(folder: Path) -> dict[int, Path]:
    """Every folder that is named like a step, by number, whole or not."""
    if not folder.is_dir():
        return {}
    found = [path for path in folder.iterdir() if path.name.isdecimal() and path.name.isascii()]
    return {int(path.name): path for path in sorted(found, key=lambda path: int(path.name))
            if path.name == str(int(path.name)) and path.is_dir()}


def is_committed(step_folder: Path) -> bool:
    """Whether Orbax finished this step."""
    return (step_folder / COMMITTED).is_file()


def committed(folder: Path) -> dict[int, float | None]:
    """The committed steps, oldest first, with their eval/loss."""
    return {step: _eval_loss(path) for step, path in numbered(folder).items()
            if is_committed(path)}


def was_committed(step_folder: Path) -> bool:
    """Whether this was ever a whole step, if it is none now: the manifest comes after the mark."""
    return is_committed(step_folder) or has_manifest(step_folder)


def damage(step_folder: Path, trees: Collection[str] | None = None) -> str | None:
    """What is wrong with a step, by its mark and its digests; see `check_manifest`."""
    if not is_committed(step_folder):
        return f"{COMMITTED} is missing"
    return check_manifest(step_folder, trees)


def damaged(folder: Path) -> list[str]:
    """Names of the steps that were set aside as damaged."""
    return sorted(path.name for path in folder.glob(f"*.{DAMAGED}*")) if folder.is_dir() else []


def clean(folder: Path) -> None:
    """Removes what a killed save or a killed deletion left, as far as the disk lets it."""
    with contextlib.suppress(OSError):  # what stays does not count as a step
        for path in list(folder.iterdir()):
            number, _, word = path.name.partition(".")
            if not number.isdecimal():
                continue
            killed_save = word.startswith(_ORBAX_TEMPORARY) or (
                not word and path.is_dir() and not was_committed(path))
            if killed_save or word == _DELETING:
                _remove(path)


def withdraw(step_folder: Path) -> None:
    """Takes back the mark that a step is whole, as far as the disk lets it; `clean` removes it."""
    with contextlib.suppress(OSError):
        (step_folder / COMMITTED).unlink()


def remove_empty(folder: Path) -> None:
    """Removes the folder of steps, where nothing is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def score(step_folder: Path, eval_loss: float) -> None:
    """Adds the eval/loss of a step that was evaluated after it was saved.

    Raises:
      OSError: it cannot be written.
      ValueError: the step's manifest is damaged.
    """
    write_atomically(step_folder / _LATER_LOSS, json.dumps({METRIC: eval_loss}))
    extend_manifest(step_folder, _LATER_LOSS)


def set_aside(step_folder: Path, word: str) -> Path:
    """Renames `<n>` to `<n>.<word>`, or `<n>.<word>-2` and so on where that is taken."""
    count = 1
    while True:
        end = word if count == 1 else f"{word}-{count}"
        target = step_folder.with_name(f"{step_folder.name}.{end}")
        if not os.path.lexists(target):
            return step_folder.rename(target)
        count += 1


def delete(step_folder: Path) -> None:
    """Deletes a step; killed half way it is not a step any more.

    Raises:
      OSError: no permission.
    """
    leaving = step_folder.with_name(f"{step_folder.name}.{_DELETING}")
    if os.path.lexists(leaving):
        _remove(leaving)
    _remove(step_folder.rename(leaving))


def kept(losses: Mapping[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps that retention keeps: the newest, the best, and every n-th."""
    newest = sorted(losses)[-config.keep_latest:]
    best = ranked(losses)[:config.keep_best]
    every = [step for step in losses
             if config.keep_every_steps and step % config.keep_every_steps == 0]
    return {*newest, *best, *every}


def ranked(losses: Mapping[int, float | None]) -> list[int]:
    """The steps that were evaluated, lowest eval/loss first, the earlier one of equals."""
    scored = {step: loss for step, loss in losses.items()
              if loss is not None and math.isfinite(loss)}
    return sorted(scored, key=lambda step: (scored[step], step))


def lack_of_space(folder: Path, state_bytes: int) -> str | None:
    """Why a save of this size would fail, if the disk tells before."""
    needed = 1.3 * state_bytes
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: {error.strerror}"
    if free >= needed:
        return None
    size, unit = (2**30, "GiB") if needed >= 2**30 / 10 else (2**20, "MiB")
    return f"{free / size:.1f} {unit} are free on {folder}, {needed / size:.1f} are needed"


def _eval_loss(step_folder: Path) -> float | None:
    """None where it was not evaluated or cannot be read; the manifest tells damage."""
    for name, keys in ((_LATER_LOSS, (METRIC,)), (_ORBAX_METADATA, ("custom_metadata", METRIC)),
                       ("metrics/metrics", (METRIC,))):  # where older runs have it
        try:
            value: Any = json.loads((step_folder / name).read_bytes())
            for key in keys:
                value = value[key]
            return float(value)
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
