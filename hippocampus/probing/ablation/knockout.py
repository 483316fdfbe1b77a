"""The whole model without some of its paths, nothing trained anew: what a knock-out says.

It stands beside the retrained models because it says something else: how much the others have come
to rely on a path, on inputs that they never saw in training. It is worse than the loss of the same
paths trained alone, often many times over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from hippocampus.config import PATHS
from hippocampus.config_files import read_json
from hippocampus.evaluation.result_table import Protocol
from hippocampus.files import read_object
from hippocampus.models.interventions import Interventions
from hippocampus.probing.ablation.cells import Study
from hippocampus.probing.probe import Probe, open_probe
from hippocampus.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Knockout:
    """What one whole model does with some of its paths.

    Attributes:
      whole: name of its cell.
      seed: of its run.
      losses: the paths that it kept -> nats per token with the gates of these paths made to sum to
        1 again, and with the gates as they were. All paths are there too: the model as it is.
      protocol: of the measurement.
    """

    whole: str
    seed: int
    losses: Mapping[tuple[str, ...], tuple[float, float]]
    protocol: Protocol


def measure(study: Study, say: Callable[[str], None], max_windows: int = 0) -> tuple[Knockout, ...]:
    """Masks paths of every finished whole model, for every subset that is a cell.

    Args:
      study: its folder's lock is held.
      say: prints a line.
      max_windows: of the validation split, evenly spaced; 0 = all.

    Returns:
      One per whole cell and finished seed; none for a grid without subsets of the paths.
    """
    found = []
    for whole in dict.fromkeys(cell.whole for cell in study.grid.cells if cell.whole):
        subsets = [cell.paths for cell in study.grid.cells
                   if whole in (cell.name, cell.whole) and not cell.match]
        for seed in study.grid.seeds:
            if study.finished(study.grid[whole], seed):
                say(f"=== knock-outs of {whole}, seed {seed}")
                folder = study.folder(study.grid[whole], seed)
                probe = open_probe(folder.path, batch_size=_rows(folder, max_windows),
                                   max_windows=max_windows)
                found.append(Knockout(whole, seed, {paths: losses(probe, paths)
                                                    for paths in subsets}, probe.protocol))
    return tuple(found)


def losses(probe: Probe, kept: Sequence[str]) -> tuple[float, float]:
    """Nats per token with some paths only: gates renormalised, and gates as they were."""
    mask_P = jnp.array([path in kept for path in PATHS], jnp.float32)
    mask_LP = jnp.tile(mask_P, (probe.n_layers, 1))
    renormalised, raw = (probe.measure(Interventions(path_mask_LP=mask_LP, renormalize=sums_to_1))
                         for sums_to_1 in (True, False))
    return renormalised.loss, raw.loss


def _rows(folder: RunFolder, max_windows: int) -> int:
    """Windows in a batch: as many as the run's own, or a few less where fewer are left over.

    A probe has full batches only, and is compared with an evaluation of the whole split.
    """
    config, _ = read_json(folder.config)
    most = config.eval.batch_size
    tokens = read_object(folder.data, "restore it from a copy").get("validation_tokens", 0)
    windows = (tokens - 1) // (config.eval.context or config.data.context)
    windows = min(windows, max_windows or windows)
    sizes = range(most, most // 2, -1) if windows >= most else [most]
    return min(sizes, key=lambda size: windows % size)
