"""Selective state spaces: S6 and SSD, forward and with the gradient, beside the usual forms.

    python benchmarks/selective_scan.py
    python benchmarks/selective_scan.py --shape=4,8192,2048 --only=s6

S6 is compared with `jax.lax.associative_scan` over all states in memory and its own gradient, SSD
with the products in the order of the paper's listing and their own gradient. With torch and
mamba_ssm installed by hand, their kernels are measured too, on the same arrays. The roofline is
the time in which the device copies what must be moved: u, delta and y once, and with the gradient
those and four arrays more (SSD: x and y). Values are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Table, copy_bandwidth, median_seconds

# isort: split
from hippocampus.ops.selective_scan import selective_scan, ssd

Arrays = tuple[jax.Array, ...]


def main() -> None:
    """Prints a table for each of the two."""
    given = parse()
    bandwidth = copy_bandwidth()
    B, T, E = given.shape
    for op in given.only:
        arrays, g, forms, n_arrays = {"s6": s6, "ssd": ssd_forms}[op](given)
        bytes_each = B * T * E * jnp.dtype(given.dtype).itemsize
        for gradient in (False, True):
            what = "forward and gradient" if gradient else "forward"
            floor = n_arrays[gradient] * bytes_each / bandwidth
            measure(f"{op} {given.shape}, {given.dtype}, {what}", forms, arrays, g, gradient, floor)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))),
                        default=(8, 2048, 1536), help="batch, tokens, channels")
    parser.add_argument("--states", type=int, default=16, help="of S6, for each channel")
    parser.add_argument("--head", type=int, default=64, help="channels and states of a head of SSD")
    parser.add_argument("--dtype", default="bfloat16", help="of u or x, B, C and y")
    parser.add_argument("--only", type=lambda text: text.split(","), default=["s6", "ssd"])
    return parser.parse_args()


def s6(given: argparse.Namespace) -> tuple[Arrays, jax.Array, dict, tuple[int, int]]:
    """Inputs, a gradient of y, and all forms of S6."""
    (B, T, E), N, dtype = given.shape, given.states, given.dtype
    keys, normal = jax.random.split(jax.random.key(0), 6), jax.random.normal
    arrays = (normal(keys[0], (B, T, E), dtype),
              jax.nn.softplus(normal(keys[1], (B, T, E)) - 3).astype(dtype),
              -jnp.broadcast_to(jnp.arange(1.0, N + 1), (E, N)),
              normal(keys[2], (B, T, N), dtype), normal(keys[3], (B, T, N), dtype),
              normal(keys[4], (E,)))

    def of(backend: str) -> Callable:
        return lambda *arrays: selective_scan(*arrays, backend=backend)[0]

    forms: dict[str, Callable] = {"associative scan, gradient by JAX": naive}
    forms |= {f"selective_scan, {name}": of(name) for name in ("pallas", "chunked", "associative")}
    return arrays, normal(keys[5], (B, T, E), dtype), forms, (3, 8)


def naive(u: jax.Array, delta: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array,
          D: jax.Array) -> jax.Array:
    """All states in memory, as it is first written down."""
    u32, delta, B, C = (v.astype(jnp.float32) for v in (u, delta, B, C))
    decay, x = jnp.exp(delta[..., None] * A), (delta * u32)[..., None] * B[:, :, None]

    def combine(left: Arrays, right: Arrays) -> Arrays:
        return left[0] * right[0], right[0] * left[1] + right[1]

    h = jax.lax.associative_scan(combine, (decay, x), axis=1)[1]
    return (jnp.einsum("bten,btn->bte", h, C) + D * u32).astype(u.dtype)


def ssd_forms(given: argparse.Namespace) -> tuple[Arrays, jax.Array, dict, tuple[int, int]]:
    """Inputs, a gradient of y, and all forms of SSD."""
    (B, T, E), P, dtype = given.shape, given.head, given.dtype
    H = E // P
    keys, normal = jax.random.split(jax.random.key(0), 6), jax.random.normal
    arrays = (normal(keys[0], (B, T, H, P), dtype),
              jax.nn.softplus(normal(keys[1], (B, T, H)) - 3), -jnp.exp(normal(keys[2], (H,))),
              normal(keys[3], (B, T, 1, P), dtype), normal(keys[4], (B, T, 1, P), dtype),
              jnp.ones((H,)))
    forms: dict[str, Callable] = {"listing of the paper, gradient by JAX": listing}
    for chunk in (64, 128, 256):
        forms[f"ssd, chunks of {chunk}"] = lambda *a, chunk=chunk: ssd(*a, chunk=chunk)[0]
    if (jax.default_backend() == "gpu" and importlib.util.find_spec("torch")
            and importlib.util.find_spec("mamba_ssm")):
        forms["mamba_ssm (Triton)"] = None
    return arrays, normal(keys[5], (B, T, H, P), dtype), forms, (2, 5)


def listing(x: jax.Array, dt: jax.Array, A: jax.Array, B: jax.Array, C: jax.Array,
            D: jax.Array, chunk: int = 128) -> jax.Array:
    """Products of chunks with heads behind the tokens, in the order of the paper's listing 1."""
    rows, T = x.shape[:2]
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    z, logs = ((x * dt[..., None]).astype(x.dtype), dt * A)
    z, logs, B, C = (v.reshape(rows, T // chunk, chunk, *v.shape[2:])
                     for v in (z, logs, B[:, :, 0], C[:, :, 0]))
    s = jnp.cumsum(logs, 2)
    within = jnp.tril(jnp.ones((chunk, chunk), bool))[..., None]
    pairs = jnp.exp(jnp.where(within, s[:, :, :, None] - s[:, :, None], -jnp.inf))
    scores = dot("bnis,bnjs->bnij", C, B)
    y = dot("bnijh,bnjhp->bnihp", (scores[..., None] * pairs).astype(x.dtype), z)
    to_end = jnp.exp(s[:, :, -1:] - s)
    ends = dot("bnjs,bnjhp->bnhps", B, (z * to_end[..., None]).astype(x.dtype))

    def step(h: jax.Array, chunk: Arrays) -> Arrays:
        return chunk[0][..., None, None] * h + chunk[1], h

    chunks = (jnp.exp(s[:, :, -1]).swapaxes(0, 1), ends.swapaxes(0, 1))
    starts = jax.lax.scan(step, jnp.zeros_like(ends[:, 0]), chunks)[1].swapaxes(0, 1)
    y += dot("bnis,bnhps->bnihp", C, starts.astype(x.dtype)) * jnp.exp(s)[..., None]
    return (y.reshape(x.shape) + D[:, None] * x).astype(x.dtype)


def measure(title: str, forms: dict[str, Callable | None], arrays: Arrays, g: jax.Array,
            gradient: bool, floor: float) -> None:
    """One table; the first form is what the others are compared with."""
    first, *_ = forms
    table, peer, expected = Table(title, peer=first), None, None
    for name, form in forms.items():
        try:
            if form is None:
                table.add(name, mamba_ssm_seconds(arrays, g, gradient), peer=peer, floor=floor)
                continue
            run = jax.jit(functools.partial(with_gradient if gradient else without, form))
            found = jax.tree.leaves(run(arrays, g))
            expected = expected or found
            far = max(map(distance, found, expected))
            del found
            seconds = median_seconds(lambda run=run: run(arrays, g))
            peer = peer or seconds
            table.add(name, seconds, peer=peer, floor=floor, note=f"differs by {far:.0e}")
        except Exception as error:
            table.fail(name, error)


def without(form: Callable, arrays: Arrays, g: jax.Array) -> Any:
    """y."""
    return form(*arrays)


def with_gradient(form: Callable, arrays: Arrays, g: jax.Array) -> Any:
    """y and the gradients of all inputs."""
    y, vjp = jax.vjp(form, *arrays)
    return y, vjp(g)


def distance(a: jax.Array, b: jax.Array) -> float:
    """Relative, of the whole arrays."""
    a, b = (np.asarray(v, np.float32) for v in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def mamba_ssm_seconds(arrays: Arrays, g: jax.Array, gradient: bool) -> float:
    """Of mamba_ssm's `mamba_chunk_scan_combined`, on the same numbers."""
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def tensor(v: jax.Array) -> Any:
        dtype = torch.bfloat16 if v.dtype == jnp.bfloat16 else torch.float32
        given = torch.tensor(np.asarray(v, np.float32), device="cuda").to(dtype)
        return given.requires_grad_(gradient)

    *tensors, D = map(tensor, arrays)
    back = tensor(g).detach()

    def run() -> Any:
        y = mamba_chunk_scan_combined(*tensors, chunk_size=256, D=D)
        if gradient:
            torch.autograd.grad(y, [*tensors, D], back)
        return y

    return median_seconds(run, lambda _: torch.cuda.synchronize())


if __name__ == "__main__":
    main()
