"""The recurrences' scans beside the memory's speed and beside other forms, in one run.

    python benchmarks/scan.py
    python benchmarks/scan.py --shapes=32x1024x768 --dtypes=bfloat16 --only=gated --peer=
    python benchmarks/scan.py --only=sweep    # other sizes of the kernels' blocks

The floor is the time in which the device copies as many bytes as must be read and written: three
arrays for a scan, eight with its gradient; four and twelve for the gated scan, whose gates are
inputs. "triton" is a scan written for torch, with the same two passes; it runs in a process of its
own before JAX takes the device.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Table, copy_bandwidth, median_seconds

SHAPES = "8x2048x1536,32x1024x768,4x8192x2048"
BACKENDS = ("pallas", "associative")
Job = tuple[str, Callable, tuple, int, str | None, Any]
"""What is measured, the function, its arguments, the bytes, its peer, the expected values."""


def scan_jobs(shape: tuple[int, ...], dtype: str, backends: tuple[str, ...]) -> Iterator[Job]:
    """linear_scan, alone and with its gradient."""
    import jax

    from hippocampus.ops.linear_scan import linear_scan

    a, x, g = arrays(shape, dtype)
    wanted = in_float64(a, x, g)
    for backend in backends:
        form = functools.partial(linear_scan, backend=backend)

        def both(a: Any, x: Any, g: Any, form: Callable = form) -> Any:
            h, pull = jax.vjp(form, a, x)
            return h, *pull(g)

        for name, function, own, count, expected in (
                ("scan", form, (a, x), 3, wanted[:1]),
                ("with gradient", both, (a, x, g), 8, wanted)):
            yield (f"{label(shape, dtype)} {name}, {backend}", function, own, count * x.nbytes,
                   f"{label(shape, dtype)} {name}", expected)


def gated_jobs(shape: tuple[int, ...], dtype: str, backends: tuple[str, ...]) -> Iterator[Job]:
    """gated_scan, alone and with its gradient."""
    import jax
    import jax.numpy as jnp

    from hippocampus.ops.gated_scan import gated_scan

    _, c, g = arrays(shape, dtype)
    gates = jax.random.normal(jax.random.key(1), (2, *shape)).astype(dtype)
    log_decay, first = jnp.linspace(-6.0, 0.0, shape[2]), jnp.zeros(shape[:2], bool)
    for backend in backends:
        def states(gates: Any, c: Any, log_decay: Any, backend: str = backend) -> Any:
            return gated_scan(gates, c, log_decay, None, first, backend=backend)

        def both(gates: Any, c: Any, log_decay: Any, g: Any, states: Callable = states) -> Any:
            h, pull = jax.vjp(states, gates, c, log_decay)
            return h, *pull(g)

        for name, function, own, count in (
                ("gated scan", states, (gates, c, log_decay), 4),
                ("gated scan with gradient", both, (gates, c, log_decay, g), 12)):
            yield (f"{label(shape, dtype)} {name}, {backend}", function, own, count * c.nbytes,
                   f"{label(shape, dtype)} {name}", None)


def sweep_jobs(shape: tuple[int, ...], dtype: str, backends: tuple[str, ...]) -> Iterator[Job]:
    """The kernels with other blocks; what does not fit into shared memory fails."""
    from hippocampus.ops.kernels import scan_hopper as kernels
    from hippocampus.ops.kernels.mosaic_gpu import Blocks

    a, x, g = arrays(shape, dtype)
    wide = 2 if dtype == "bfloat16" else 1
    for steps, stages, out_stages, group in ((16, 4, 2, 16), (16, 6, 2, 16), (32, 3, 1, 16),
                                             (32, 4, 2, 8), (32, 4, 2, 16), (64, 2, 2, 16)):
        blocks = Blocks(steps * wide, stages, out_stages, group)
        for name, function, own, count in (
                ("scan", kernels.scan, (a, x), 3),
                ("backward", kernels.scan_backward, (a, x, g), 5)):
            yield (f"{label(shape, dtype)} {name}, {blocks}",
                   functools.partial(function, blocks=blocks), own, count * x.nbytes, None, None)


def arrays(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any, Any]:
    """Decays of long memory, inputs and gradients."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    a = jax.random.uniform(keys[0], shape, minval=0.9, maxval=0.9999)
    return tuple(v.astype(dtype) for v in (a, *(jax.random.normal(k, shape) for k in keys[1:])))


def in_float64(a: Any, x: Any, g: Any) -> list[Any]:
    """h, da and dx of the first channels of the first row."""
    import numpy as np

    a, x, g = (np.asarray(v[0, :, :4].astype("float32"), np.float64) for v in (a, x, g))
    h, later = np.zeros_like(a), np.zeros_like(a)
    for t in range(len(a)):
        h[t] = a[t] * (h[t - 1] if t else 0) + x[t]
    for t in reversed(range(len(a))):
        later[t] = g[t] + (a[t + 1] * later[t + 1] if t < len(a) - 1 else 0)
    return [h, later * np.concatenate([np.zeros_like(h[:1]), h[:-1]]), later]


def distance(found: Any, wanted: list[Any]) -> str:
    """The largest relative distance of a result from float64."""
    import numpy as np

    found = found if isinstance(found, tuple) else (found,)
    worst = max(np.linalg.norm(np.asarray(f[0, :, :4].astype("float32"), np.float64) - w)
                / np.linalg.norm(w) for f, w in zip(found, wanted, strict=True))
    return f"error {worst:.0e}"


def label(shape: tuple[int, ...], dtype: str) -> str:
    """Of a line."""
    return f"{'x'.join(map(str, shape)):12} {dtype:8}"


TRITON = '''
import triton, triton.language as tl
@triton.jit
def rows(P, o, t, E, s: tl.constexpr, U: tl.constexpr):
    v = ()
    for u in tl.static_range(U):
        v = v + (tl.load(P + o + tl.maximum(t + s * u, 0) * E),)
    return v
@triton.jit
def fwd(A, X, H, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr, U: tl.constexpr):
    o = tl.program_id(1) * T * E + tl.program_id(0) * N + tl.arange(0, N)
    h = tl.zeros((N,), tl.float32)
    av = rows(A, o, 0, E, 1, U)
    xv = rows(X, o, 0, E, 1, U)
    for t in range(0, T, U):
        n = tl.minimum(t + U, T - U)
        an = rows(A, o, n, E, 1, U)
        xn = rows(X, o, n, E, 1, U)
        for u in tl.static_range(U):
            h = av[u].to(tl.float32) * h + xv[u].to(tl.float32)
            tl.store(H + o + (t + u) * E, h)
        av = an
        xv = xn
@triton.jit
def bwd(A, H, G, DA, DX, T: tl.constexpr, E: tl.constexpr, N: tl.constexpr, U: tl.constexpr):
    o = tl.program_id(1) * T * E + tl.program_id(0) * N + tl.arange(0, N)
    c = tl.zeros((N,), tl.float32)
    for t in range(0, T, U):
        e = T - 1 - t
        av = rows(A, o, e, E, -1, U)
        hv = rows(H, o, e - 1, E, -1, U)
        gv = rows(G, o, e, E, -1, U)
        for u in tl.static_range(U):
            d = gv[u].to(tl.float32) + c
            tl.store(DX + o + (e - u) * E, d)
            c = av[u].to(tl.float32) * d
            tl.store(DA + o + (e - u) * E, tl.where(e - u > 0, d * hv[u].to(tl.float32), 0.0))
'''


def time_triton(shapes: list[tuple[int, ...]], dtypes: list[str]) -> None:
    """The peer's process: prints its times, the best of two sizes, as one JSON object."""
    import torch
    import triton.testing

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "triton_scan.py"
        path.write_text(TRITON)
        spec: Any = importlib.util.spec_from_file_location("triton_scan", path)
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        seconds = {}
        for shape in shapes:
            for dtype in dtypes:
                B, T, E = shape
                a, x, g = (torch.rand(shape, device="cuda").to(getattr(torch, dtype))
                           for _ in range(3))
                h, da, dx = (torch.empty_like(a) for _ in range(3))
                found = []
                for N, U in ((32, 16), (64, 16)):
                    sizes, grid = {"T": T, "E": E, "N": N, "U": U, "num_warps": 1}, (E // N, B)
                    found.append([triton.testing.do_bench(run, rep=40, return_mode="median") / 1e3
                                  for run in (
                        functools.partial(kernels.fwd[grid], a, x, h, **sizes),
                        functools.partial(kernels.bwd[grid], a, h, g, da, dx, **sizes))])
                forward, backward = min(found, key=sum)
                seconds[f"{label(shape, dtype)} scan"] = forward
                seconds[f"{label(shape, dtype)} with gradient"] = forward + backward
    print(json.dumps(seconds))


def measure(jobs: list[Job], table: Table, bandwidth: float, peers: dict[str, float]) -> None:
    """Compiles side by side, measures one after the other."""
    import jax

    with ThreadPoolExecutor() as pool:
        compiled = [pool.submit(lambda f=job[1], own=job[2]: jax.jit(f).lower(*own).compile())
                    for job in jobs]
        wait(compiled)  # XLA tries variants on the device while it compiles
        for (name, _, own, n_bytes, peer, wanted), future in zip(jobs, compiled, strict=True):
            try:
                run = future.result()
                note = distance(run(*own), wanted) if wanted else ""
                seconds = median_seconds(lambda run=run, own=own: run(*own), batch_seconds=0.02)
                table.add(name, seconds, peer=peers.get(peer or ""), floor=n_bytes / bandwidth,
                          note=note)
            except Exception as error:
                table.fail(name, error)


def main() -> None:
    """Prints a line per form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="BxTxE, comma-separated")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--only", default="scan,gated", help="scan, gated, sweep")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--peer", default="triton", help="triton (needs torch), or nothing")
    parser.add_argument("--time-triton", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in flags.shapes.split(",")]
    dtypes, backends = flags.dtypes.split(","), tuple(flags.backends.split(","))
    if flags.time_triton:
        time_triton(shapes, dtypes)
        return
    peers: dict[str, float] = {}
    if flags.peer == "triton" and importlib.util.find_spec("triton") and "scan" in flags.only:
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--time-triton", f"--shapes={flags.shapes}",
             f"--dtypes={flags.dtypes}"], capture_output=True, text=True)
        if done.returncode:
            print("no peer:", (done.stderr.strip().splitlines() or ["?"])[-1])
        else:
            peers = json.loads(done.stdout.splitlines()[-1])
            print(f"peer measured in {time.perf_counter() - begin:.0f} s")
    bandwidth = copy_bandwidth()
    table = Table(f"scans; copy {bandwidth / 1e12:.2f} TB/s", "torch with triton")
    kinds = {"scan": scan_jobs, "gated": gated_jobs, "sweep": sweep_jobs}
    for name, seconds in peers.items():
        shape, dtype, what = name.split(maxsplit=2)
        n_bytes = math.prod(map(int, shape.split("x"))) * (4 if dtype == "float32" else 2)
        table.add(f"{name}, triton", seconds, peer=seconds,
                  floor=(3 if what == "scan" else 8) * n_bytes / bandwidth)
    measure([job for shape in shapes for dtype in dtypes for kind in flags.only.split(",")
             for job in kinds[kind](shape, dtype, backends)], table, bandwidth, peers)


if __name__ == "__main__":
    main()
