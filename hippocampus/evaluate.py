"""Measures a model on held-out text: `python -m hippocampus.evaluate --workdir=RUN`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hippocampus import distributed
from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags, evaluates, and prints the table."""
    parser = Parser("evaluate", "Measure a trained model on held-out text.")
    parser.add_argument("--workdir", required=True, help="run folder of a training")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--text", default="", metavar="FILE",
                        help="score this UTF-8 text instead of a split")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    parser.add_argument("--weights", choices=("both", "ema", "raw"), default="both",
                        help="running average of the parameters, the parameters, or both")
    parser.add_argument("--context", type=int, help="tokens in a window (default: the run's)")
    parser.add_argument("--stride", type=int, help="tokens from one window to the next; 0 = "
                        "context, disjoint windows (default: the run's)")
    parser.add_argument("--batch_size", type=int, help="windows at once (default: the run's)")
    parser.add_argument("--out", metavar="DIR", help="folder of the JSON and CSV files (default: "
                        "evaluations/ in the run folder)")
    distributed.add_flags(parser)
    flags = parser.parse_args(arguments)
    distributed.initialize(flags.coordinator_address, flags.num_processes, flags.process_id)

    from rich.console import Console

    from hippocampus.config import MeshConfig
    from hippocampus.evaluation.stand_alone import Request, Spread, evaluate_run
    from hippocampus.training import sharding

    mesh = sharding.make_mesh(MeshConfig(devices=flags.expect_devices))
    first = distributed.is_first()
    spread = Spread(lambda batch: sharding.to_devices(batch, mesh), sharding.replicated(mesh),
                    mesh.size, first) if mesh.size > 1 else Spread()
    console = Console(highlight=False, quiet=not first)
    request = Request(flags.split, flags.text, flags.step, flags.weights, flags.context,
                      flags.stride, flags.batch_size)
    with sharding.around(mesh):
        report, path = evaluate_run(flags.workdir, request, flags.out,
                                    _track if console.is_terminal and first else _quiet, spread)
    console.print(report.render())
    console.print(f"\n{path}", soft_wrap=True)


def _track(batches: Iterable[Any], name: str, total: int) -> Iterable[Any]:
    """A progress bar over the batches, gone when they are."""
    from rich.progress import track

    return track(batches, name, total, transient=True)


def _quiet(batches: Iterable[Any], name: str, total: int) -> Iterable[Any]:
    return batches


if __name__ == "__main__":
    run_verb(main)
