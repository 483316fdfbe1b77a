"""Value and gradient of the cross-entropy, beside whole logits in JAX and in PyTorch.

    python benchmarks/cross_entropy.py
    python benchmarks/cross_entropy.py --tokens=32768 --vocabulary=50257,267735 --width=768

The loss of random bfloat16 states over a float32 table, with z-loss, and its gradients for both:
what a training step does with its head. The table is padded to a multiple of 128 rows, as models
pad it. Peers: all logits in float32, differentiated by JAX; `F.cross_entropy` of PyTorch under
autocast and torch.compile, without z-loss, where PyTorch sees the same device. The ratio is
against the faster of them. The roofline is the time of three matrix products at the speed of a
square one of the same dtype, measured in the same run. Memory is the temporary memory that the
compiled program asks for.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Table, median_seconds
from hippocampus.devices import this_device
from hippocampus.ops.cross_entropy import Head, cross_entropy

Z_WEIGHT = 1e-4
GIB = 2**30


def main(argv: list[str] | None = None) -> None:
    """Prints one table a vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = this_device().platform == "cpu"
    parser.add_argument("--tokens", type=int, default=1024 if small else 32_768)
    parser.add_argument("--vocabulary", default="32768" if small else "32768,50257,267735")
    parser.add_argument("--width", type=int, default=128 if small else 768)
    parser.add_argument("--backends", default="chunked,fused")
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args(argv)
    speed = matmul_flops()
    for vocabulary in map(int, arguments.vocabulary.split(",")):
        table = Table(f"cross-entropy, {arguments.tokens} tokens of width {arguments.width}, "
                      f"{vocabulary} ids", "the faster peer")
        floor = 6 * arguments.tokens * padded(vocabulary) * arguments.width / speed
        peers = list(peer_lines(table, arguments, vocabulary, floor))
        fastest = min(peers, default=None)
        for backend in arguments.backends.split(","):
            try:
                seconds, memory = ours(arguments, vocabulary, backend)
            except Exception as error:  # the other lines go on
                table.fail(backend, error)
                continue
            table.add(f"this project, {backend}", seconds, peer=fastest, floor=floor, note=memory)


def peer_lines(table: Table, arguments: argparse.Namespace, vocabulary: int,
               floor: float) -> Iterator[float]:
    """Adds the peers' lines; gives their seconds."""
    runs = {"JAX, all logits in float32": functools.partial(ours, backend="full")}
    if importlib.util.find_spec("torch") and not arguments.no_torch:
        runs["PyTorch, autocast, torch.compile"] = in_torch
    for what, run in runs.items():
        try:
            seconds, memory = run(arguments, vocabulary)
        except Exception as error:  # out of memory, or no such device: the other lines go on
            table.fail(what, error)
            continue
        table.add(what, seconds, floor=floor, note=memory)
        yield seconds


def ours(arguments: argparse.Namespace, vocabulary: int, backend: str) -> tuple[float, str]:
    """Seconds of value and gradient, and what the compiled program needs."""
    low = jnp.float32 if this_device().platform == "cpu" else jnp.bfloat16
    rows = 32 if arguments.tokens % 32 == 0 else 1
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (rows, arguments.tokens // rows)
    hidden = jax.random.normal(keys[0], (*shape, arguments.width), jnp.float32).astype(low)
    table = 0.02 * jax.random.normal(keys[1], (padded(vocabulary), arguments.width))
    targets = jax.random.randint(keys[2], shape, 0, vocabulary)
    weight = jnp.full(shape, 1 / arguments.tokens)

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        head = Head(table, vocab_size=vocabulary)
        return cross_entropy(hidden, head, targets, weight, z_weight=Z_WEIGHT, backend=backend)[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, table).compile()
    seconds = median_seconds(lambda: compiled(hidden, table))
    return seconds, f"{compiled.memory_analysis().temp_size_in_bytes / GIB:.2f} GiB"


def in_torch(arguments: argparse.Namespace, vocabulary: int) -> tuple[float, str]:
    """The same in PyTorch."""
    import torch

    on_gpu = this_device().platform == "gpu"
    device = "cuda" if on_gpu else "cpu"
    hidden = torch.randn(arguments.tokens, arguments.width, device=device, requires_grad=True,
                         dtype=torch.bfloat16 if on_gpu else torch.float32)
    table = (0.02 * torch.randn(padded(vocabulary), arguments.width, device=device))
    table.requires_grad_()
    targets = torch.randint(0, vocabulary, (arguments.tokens,), device=device)

    @torch.compile
    def loss(hidden: Any, table: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=on_gpu):
            logits = hidden @ table.T
        return torch.nn.functional.cross_entropy(logits.float(), targets)

    def run() -> Any:
        return torch.autograd.grad(loss(hidden, table), (hidden, table))

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    run()
    wait(None)
    if not on_gpu:
        return median_seconds(run, wait), ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = median_seconds(run, wait)
    used = torch.cuda.max_memory_allocated() - before
    del hidden, table
    torch.cuda.empty_cache()
    return seconds, f"{used / GIB:.2f} GiB with the gradients"


def matmul_flops(size: int | None = None) -> float:
    """FLOP/s of a square matrix product in the dtype that the loss computes in."""
    cpu = this_device().platform == "cpu"
    size = size or (1024 if cpu else 8192)
    a = jnp.ones((size, size), jnp.float32 if cpu else jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / median_seconds(lambda: product(a))


def padded(vocabulary: int) -> int:
    """Rows of the table."""
    return 128 * math.ceil(vocabulary / 128)


if __name__ == "__main__":
    main()
