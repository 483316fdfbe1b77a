"""Puts runs side by side: `python -m hippocampus.compare RUN RUN`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hippocampus.errors import ConfigError
from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags, prints the tables, writes them and the curves."""
    parser = Parser("compare", "Compare runs: metrics, settings that differ, curves.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, finished or not")
    parser.add_argument("--out", metavar="DIR", help="folder of the files (default: "
                        "comparisons/<names of the runs> beside the first run)")
    flags = parser.parse_args(arguments)

    from rich.console import Console

    from hippocampus.evaluation.comparison import Comparison, read_runs
    from hippocampus.evaluation.curves import draw_curves
    from hippocampus.files import check_writable

    comparison = Comparison(read_runs(flags.runs))
    names = "-".join(run.path.resolve().name for run in comparison.runs)
    out = Path(flags.out or Path(flags.runs[0]).resolve().parent / "comparisons" / names[:120])
    check_writable(out)
    console = Console(highlight=False)
    console.print(comparison.render())
    written = comparison.write(out)
    try:
        written += draw_curves(comparison, out)
    except ConfigError as error:
        console.print(f"no curves: {error}")
    console.print()
    for path in written:
        console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
