"""Value and gradient of K retrieval steps, beside PyTorch's fused attention called K times.

    python benchmarks/hopfield.py
    python benchmarks/hopfield.py --shape=32,1024,12,64 --steps=1,3

States and keys are random and bfloat16 (float32 on a CPU); every step retrieves from the keys
s <= t with an inverse temperature per head, and the last state is differentiated for states, keys
and temperatures. Peers: `scaled_dot_product_attention` of PyTorch on each backend that has it, fed
with its own output K times, keys as values, no temperature. The ratio is against the fastest of
them. The roofline is the causal work, 7 products of T T d / 2 a step, at the speed of a square
product measured in the same run. Memory is the temporary memory that the compiled program asks for:
below T T numbers a head, as nothing of that shape is kept.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cross_entropy import GIB, matmul_flops
from benchmarks.timing import Table, median_seconds
from hippocampus.devices import choose, this_device
from hippocampus.ops import hopfield

Shape = tuple[int, int, int, int]


def main(argv: list[str] | None = None) -> None:
    """Prints one table a number of steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    small = this_device().platform == "cpu"
    parser.add_argument("--shape", default="2,256,2,64" if small else "32,1024,12,64",
                        help="B,T,H,d")
    parser.add_argument("--steps", default="1,3")
    parser.add_argument("--backend", default=choose(this_device()).attention)
    parser.add_argument("--no-torch", action="store_true")
    arguments = parser.parse_args(argv)
    B, T, H, d = shape = tuple(map(int, arguments.shape.split(",")))
    speed = matmul_flops()
    for steps in map(int, arguments.steps.split(",")):
        table = Table(f"{steps} steps of retrieval, B,T,H,d = {shape}", "the fastest peer")
        floor = 7 * steps * B * H * T * T * d / speed
        peers = []
        if importlib.util.find_spec("torch") and not arguments.no_torch:
            for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
                if name == "MATH" and not small:
                    continue
                try:
                    peers.append(in_torch(shape, steps, name))
                except Exception as error:  # not every device has every backend
                    table.fail(f"PyTorch, {name.lower()}", error)
                    continue
                table.add(f"PyTorch, {name.lower()}", peers[-1], floor=floor)
        seconds, memory = ours(shape, steps, arguments.backend)
        table.add(f"this project, {arguments.backend}", seconds, peer=min(peers, default=None),
                  floor=floor, note=memory)


def ours(shape: Shape, steps: int, backend: str) -> tuple[float, str]:
    """Seconds of value and gradients, and what the compiled program needs."""
    low = jnp.float32 if this_device().platform == "cpu" else jnp.bfloat16
    xi, keys, g = (jax.random.normal(key, shape, jnp.float32).astype(low)
                   for key in jax.random.split(jax.random.key(0), 3))
    beta = jnp.full(shape[2], shape[3]**-0.5)

    def retrieved(xi: jax.Array, keys: jax.Array, beta: jax.Array) -> jax.Array:
        scaled = hopfield.scaled(keys, beta)
        for _ in range(steps):
            xi = hopfield.retrieve(xi, keys, None, beta, backend=backend, scaled_BTHd=scaled)
        return xi

    def both(g: jax.Array, *inputs: jax.Array) -> Any:
        new, pull = jax.vjp(retrieved, *inputs)
        return new, pull(g)

    compiled = jax.jit(both).lower(g, xi, keys, beta).compile()
    seconds = median_seconds(lambda: compiled(g, xi, keys, beta))
    return seconds, f"{compiled.memory_analysis().temp_size_in_bytes / GIB:.2f} GiB"


def in_torch(shape: Shape, steps: int, backend: str) -> float:
    """The same with PyTorch's attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, T, H, d = shape
    on_gpu = this_device().platform == "gpu"
    make = functools.partial(torch.randn, B, H, T, d, device="cuda" if on_gpu else "cpu",
                             dtype=torch.bfloat16 if on_gpu else torch.float32)
    xi, keys, g = make(requires_grad=True), make(requires_grad=True), make()

    def run() -> Any:
        state = xi
        for _ in range(steps):
            state = torch.nn.functional.scaled_dot_product_attention(state, keys, keys,
                                                                     is_causal=True)
        return torch.autograd.grad(state, (xi, keys), g)

    def wait(_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return median_seconds(run, wait)


if __name__ == "__main__":
    main()
