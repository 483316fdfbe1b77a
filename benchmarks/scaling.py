"""Weak scaling: the training step of a config on one device and on all, batch per device fixed.

    python benchmarks/scaling.py
    XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true python benchmarks/scaling.py

Efficiency = tokens/s of N devices / (N x tokens/s of one device), both in this process; above 1 is
noise. All programs are measured in turn, several rounds, and the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from benchmarks.steps import Program, compile_step, measure, one_line
from hippocampus.config_files import load_config


def main() -> None:
    """Prints a line per way to share the work, efficiency first."""
    given = parse()
    n = len(jax.devices())
    print(f"{n} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {given.config}, "
          f"{given.batch} rows a device, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}")
    print("| efficiency | devices | ms a step | tokens/s | GiB a device |")
    print("|---|---|---|---|---|", flush=True)
    names = ["one", *given.layouts]
    with ThreadPoolExecutor(len(names)) as pool:
        programs = dict(zip(names, pool.map(lambda name: compiled(given, name, n), names),
                            strict=True))
    found: dict[str, float | Exception] = {}
    for name in names * given.rounds:
        if isinstance(before := found.get(name, float("inf")), Exception):
            continue
        try:
            found[name] = min(before, measured(programs[name], given.steps))
        except Exception as error:  # a line that says so; the others go on
            found[name] = error
    if isinstance(seconds := found["one"], Exception):
        raise seconds
    for name in names:
        took, program = found[name], programs[name]
        shown = "1" if name == "one" else f"{name}={n}"
        if isinstance(took, Exception) or isinstance(program, Exception):
            print(f"| - | {shown} | {one_line(took)} | | |")  # type: ignore[arg-type]
        else:
            print(line(shown, seconds / took, took, program))


def measured(program: Program | Exception, steps: int) -> float:
    """Seconds of a step; raises what kept it from being compiled."""
    if isinstance(program, Exception):
        raise program
    return measure(program, steps).seconds


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/wt103_bpe.py")
    parser.add_argument("--batch", type=int, default=32, help="rows per device")
    parser.add_argument("--steps", type=int, default=20, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layouts", type=lambda text: text.split(","), default=["data", "fsdp"])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="of the config, such as model.segments.train=1")
    return parser.parse_args()


def compiled(given: argparse.Namespace, layout: str, n: int) -> Program | Exception:
    """The step of one layout, or why there is none."""
    ways = 1 if layout == "one" else n
    changes = {"train.batch_size": given.batch * ways, "train.grad_accumulation": 1,
               **dict(change.split("=", 1) for change in given.set)}
    if layout != "one":
        changes |= {"mesh.data": 1, f"mesh.{layout}": n}
    try:
        return compile_step(load_config(given.config, changes), jax.devices()[:ways])
    except Exception as error:
        return error


def line(devices: str, efficiency: float, seconds: float, program: Program) -> str:
    """Of the table."""
    return (f"| {efficiency:.3f} | {devices} | {seconds * 1e3:.1f} "
            f"| {program.tokens / seconds:,.0f} | {program.bytes_per_device / 2**30:.1f} |")


if __name__ == "__main__":
    main()
