"""How the cost of a training step grows with the context, at a fixed number of tokens.

    python benchmarks/context.py
    python benchmarks/context.py --sequence=2 --lengths=131072 --tokens=131072 --models=window

Blocks of `configs/wt103_bpe.py` (768 wide, eight layers, one pass) with state space only, state
space and attention in a window, or attention only. Layers are scanned and computed again in the
backward pass (`--remat`), in every row alike. With `--sequence=N` the time axis of every row is cut
over N devices, and each line is followed by the same step on one device. The step takes the next
one's place only after its loss has been read, so host time is in it; it is small at these sizes.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.steps import Program, compile_step, measure, one_line
from hippocampus.config_files import load_config

MODELS = {"ssm": ("ssm",), "window": ("ssm", "attention"), "attention": ("attention",)}


def main() -> None:
    """Compiles all rows side by side, then runs them one after the other."""
    given = parse()
    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}, {given.tokens:,} "
          f"tokens a step, remat {given.remat}, window {given.window}")
    print("| model | T | devices | ms a step | tokens/s | GiB a device | loss, first to last |")
    print("|---|---|---|---|---|---|---|", flush=True)
    cases = [(model, length, ways) for length in given.lengths for model in given.models
             for ways in sorted({given.sequence, 1}, reverse=True)]
    with ThreadPoolExecutor(given.threads) as pool:
        programs = list(pool.map(lambda case: compiled(given, *case), cases))
    for case, program in zip(cases, programs, strict=True):
        print(row(*case, program, given.steps), flush=True)


def parse() -> argparse.Namespace:
    """The flags."""
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/wt103_bpe.py")
    parser.add_argument("--lengths", type=numbers, default=[2**n * 1024 for n in range(7)])
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--sequence", type=int, default=1, help="devices along the time axis")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="of the config, such as model.d_model=64")
    return parser.parse_args()


def compiled(given: argparse.Namespace, model: str, length: int, ways: int) -> Program | Exception:
    """The step of a row, or why there is none."""
    paths = MODELS[model]
    changes: dict[str, Any] = {
        "data.context": length, "train.batch_size": max(1, given.tokens // length),
        "train.grad_accumulation": 1, "model.paths": paths, "model.layer_paths": (),
        "model.segments.train": 1, "model.segments.eval": 1, "model.dropout": 0.0,
        "model.attention.window": given.window if "ssm" in paths and len(paths) > 1 else 0,
        "model.scan_layers": True, "model.remat": given.remat, "mesh.sequence": ways,
        "mesh.data": 1, "optimizer.warmup_steps": 1,
        **dict(change.split("=", 1) for change in given.set)}
    try:
        return compile_step(load_config(given.config, changes), jax.devices()[:ways])
    except Exception as error:  # a row that says so; the others go on
        return error


def row(model: str, length: int, ways: int, program: Program | Exception, steps: int) -> str:
    """A line of the table."""
    what = f"| {model} | {length:,} | {ways} |"
    if isinstance(program, Exception):
        return f"{what} - | - | - | {one_line(program)} |"
    gib = program.bytes_per_device / 2**30
    try:
        found = measure(program, steps)
    except Exception as error:
        return f"{what} - | - | {gib:.1f} | {one_line(error)} |"
    return (f"{what} {found.seconds * 1e3:.1f} | {program.tokens / found.seconds:,.0f} | {gib:.1f} "
            f"| {found.losses[0]:.4f} to {found.losses[-1]:.4f} |")


if __name__ == "__main__":
    main()
