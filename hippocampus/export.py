"""Makes a folder to pass on: `python -m hippocampus.export --workdir=RUN --out=FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hippocampus.verbs import Parser, run_verb

if TYPE_CHECKING:
    from rich.console import Console

    from hippocampus.exports.model_card import Card


def main(arguments: Sequence[str]) -> None:
    """Parses flags, exports, and prints what was made."""
    parser = Parser("export", "Write a trained model as safetensors, with its model card.")
    parser.add_argument("--workdir", required=True, help="run folder of a training")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="running average of the parameters, or the parameters")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                        help="of matrices; all else stays float32")
    parser.add_argument("--quantize", choices=("int8",), help="matrices in int8, with a scale per "
                        "output channel")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    flags = parser.parse_args(arguments)
    if flags.quantize and flags.dtype != "float32":
        parser.error(f"--quantize={flags.quantize} and --dtype={flags.dtype}: choose one")

    from rich.console import Console

    from hippocampus.evaluation.export_run import Request, export_run

    card = export_run(flags.workdir, flags.out, Request(
        flags.weights, flags.step, flags.quantize or flags.dtype, flags.overwrite))
    console = Console(highlight=False)
    _print(card, console)
    console.print(f"\n{flags.out}", soft_wrap=True)


def _print(card: Card, console: Console) -> None:
    from hippocampus.evaluation.tables import number, render
    from hippocampus.exports.model_card import WEIGHTS, size

    record, cost = card.record, card.cost
    title = (f"{card.config.name} step {record.step}, {WEIGHTS[record.weights]} weights: "
             f"{card.parameters:,} parameters, {size(cost.bytes_after)}")
    if record.storage == "float32":
        console.print(title)
        return
    cells = [["size", size(cost.bytes_before), size(cost.bytes_after),
              f"{cost.bytes_after / cost.bytes_before - 1:+.1%}"]]
    if cost.bits_before is not None and cost.bits_after is not None:
        cells.append(["bits/byte", number(cost.bits_before, 4), number(cost.bits_after, 4),
                      f"{cost.bits_after / cost.bits_before - 1:+.2%}"])
    console.print(render(title, ("", "float32", record.storage, "change"), cells,
                         tuple(filter(None, (cost.note, cost.reason)))))


if __name__ == "__main__":
    run_verb(main)
