"""Trains models that differ in one thing, and compares: `python -m hippocampus.ablate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hippocampus.training.signals import StopSignal
from hippocampus.verbs import Parser, run_verb, take_overrides


def main(arguments: Sequence[str]) -> None:
    """Parses flags, trains what is missing, prints the tables and writes them."""
    parser = Parser("ablate", "Train subsets of the paths, or values of fields, with several "
                    "seeds, and compare them.")
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]",
                        help="where all cells start from; --config.a.b=c changes a field of it")
    parser.add_argument("--over", action="append", default=[], metavar="FIELD=VALUE,VALUE",
                        help="values of a field; several --over give all combinations; a value "
                        "with commas in brackets")
    parser.add_argument("--paths", action="store_true",
                        help="every subset of the paths (the default without --over)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every cell (default: 3)")
    parser.add_argument("--match", default="", metavar="parameters,flops",
                        help="also single paths as large, or as costly, as the whole model")
    parser.add_argument("--baseline", default="", metavar="CELL", help="what is compared with "
                        "(default: the cell that changes nothing)")
    parser.add_argument("--target_loss", type=float, metavar="LOSS", help="what steps, tokens and "
                        "seconds are counted to (default: a loss that all runs reach)")
    parser.add_argument("--max_windows", type=int, default=0, metavar="N", help="windows of the "
                        "knock-outs (default: 0, the whole validation split)")
    parser.add_argument("--out", metavar="DIR", help="default: ablations/<config name>")
    parser.add_argument("--check", action="store_true", help="print the cells, train nothing")
    rest, overrides = take_overrides(arguments)
    flags = parser.parse_args(rest)
    with StopSignal(owns_process=True) as stop:
        from rich.console import Console

        from hippocampus.probing.ablation.grid import make_grid

        grid = make_grid(flags.config, overrides, flags.over, flags.seeds, flags.paths,
                         flags.baseline)
        if any(cell.config.train.deterministic for cell in grid.cells):
            from hippocampus.devices import prepare_deterministic

            prepare_deterministic()
        from hippocampus.probing.ablation.study import carry_out, overview, prepare

        study = prepare(grid, flags.out or Path("ablations") / grid.name,
                        [kind for kind in flags.match.split(",") if kind])
        console = Console(highlight=False, soft_wrap=True)
        if flags.check:
            console.print(overview(study))
            return
        done = carry_out(study, lambda line: console.print(line, markup=False),
                         flags.target_loss, flags.max_windows, stop)
        for table in done.result.tables:
            console.print()
            console.print(table.render())
        for line in (*done.result.notes, "", *map(str, done.written)):
            console.print(line, markup=False)


if __name__ == "__main__":
    run_verb(main)
