"""Weak scaling: the training step of a config on each device alone and on all of them.

    python benchmarks/scaling.py
    XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true python benchmarks/scaling.py

The batch per device is fixed. Efficiency = tokens/s of N devices / the sum of what each of them
does alone, all in this process: devices of one kind differ by a per cent or two, and a step takes
as long as the slowest. All programs are measured in turn, several rounds, and the fastest round of
each counts.
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

ALONE = "device "


def main() -> None:
    """Prints a line per way to share the work, efficiency first."""
    given = parse()
    n = len(jax.devices())
    print(f"{n} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {given.config}, "
          f"{given.batch} rows a device, XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}")
    print("| efficiency | devices | ms a step | tokens/s | GiB a device |")
    print("|---|---|---|---|---|", flush=True)
    alone = [f"{ALONE}{i}" for i in range(n)]
    names = [*alone, *given.layouts]
    with ThreadPoolExecutor(len(names)) as pool:
        programs = dict(zip(names, pool.map(lambda name: compiled(given, name), names),
                            strict=True))
    seconds: dict[str, float] = {}
    for name in names * given.rounds:
        program = programs[name]
        if isinstance(program, Program):
            try:
                seconds[name] = min(measure(program, given.steps).seconds,
                                    seconds.get(name, float("inf")))
            except Exception as error:  # a line that says so; the others go on
                programs[name] = error
    rates = {name: program.tokens / seconds[name] for name, program in programs.items()
             if isinstance(program, Program)}
    ideal = sum(rates.get(name, float("nan")) for name in alone)
    for name in names:
        program, shown = programs[name], name if name in alone else f"{name}={n}"
        if not isinstance(program, Program):
            print(f"| - | {shown} | {one_line(program)} | | |")
            continue
        efficiency = rates[name] / ideal * (n if name in alone else 1)
        print(f"| {efficiency:.3f} | {shown} | {seconds[name] * 1e3:.1f} | {rates[name]:,.0f} "
              f"| {program.bytes_per_device / 2**30:.1f} |")


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


def compiled(given: argparse.Namespace, name: str) -> Program | Exception:
    """The step of one layout, or of one device alone; or why there is none."""
    devices = jax.devices()
    if name.startswith(ALONE):
        devices = [devices[int(name.removeprefix(ALONE))]]
    changes = {"train.batch_size": given.batch * len(devices), "train.grad_accumulation": 1,
               **dict(change.split("=", 1) for change in given.set)}
    if not name.startswith(ALONE):
        changes |= {"mesh.data": 1, f"mesh.{name}": len(devices)}
    try:
        return compile_step(load_config(given.config, changes), devices)
    except Exception as error:
        return error


if __name__ == "__main__":
    main()
