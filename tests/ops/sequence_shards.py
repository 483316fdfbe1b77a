"""Ops along a time axis that is cut over eight virtual devices, against the plain ops.

    python tests/ops/sequence_shards.py '[[data, fsdp, tensor, sequence], …]'

Prints one JSON object: per mesh and op, how far values and gradients are from those without a
mesh, in units of the dtype's epsilon times the largest value.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

B, T, E, H, G, WIDTH, SLOTS, V = 4, 16, 8, 4, 2, 4, 5, 128


def ops() -> dict[str, tuple[Callable, tuple]]:
    """Name -> a function and what it is differentiated by."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from hippocampus.ops import (
        attention,
        causal_conv,
        embedding,
        fixed_point,
        gated_scan,
        hopfield,
        linear_scan,
    )

    draw = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = jnp.float32) -> Any:
        return jnp.asarray(draw.normal(size=shape), dtype)

    ids = jnp.asarray(np.sort(draw.integers(0, 3, (B, T)), axis=1).astype(np.int32))
    reset = jnp.asarray(draw.random((B, T)) < 0.2)
    a, x, h0 = jax.nn.sigmoid(normal(B, T, E) + 1), normal(B, T, E), normal(B, E)
    cases: dict[str, tuple[Callable, tuple]] = {}
    for backend in ("sequential", "associative", "chunked", "pallas"):
        cases[f"scan, {backend}"] = (
            lambda a, x, h0, b=backend: linear_scan.linear_scan(a, x, h0, reset, backend=b),
            (a, x, h0))
    cases["scan without a first state"] = (
        lambda a, x: linear_scan.linear_scan(a, x, backend="chunked"), (a, x))
    for backend in ("chunked", "pallas"):
        cases[f"gated scan, {backend}"] = (
            lambda gates, c, log_decay, scale, b=backend: gated_scan.gated_scan(
                gates, c, log_decay, scale, reset, backend=b),
            (normal(2, B, T, E), normal(B, T, E), normal(E), normal(E)))
    for name, dtype in (("float32", jnp.float32), ("bfloat16", jnp.bfloat16)):
        q, k, v = (normal(B, T, n, WIDTH, dtype=dtype) for n in (H, G, G))
        keys, slots = normal(B, T, H, WIDTH, dtype=dtype), normal(SLOTS, H, WIDTH)
        beta = jnp.exp(0.1 * normal(H))
        for window, documents in ((0, None), (2, None), (3, ids), (8, ids), (9, ids)):
            cases[f"attention, window {window}, {name}"] = (
                lambda q, k, v, w=window, i=documents: attention.attention(
                    q, k, v, window=w, document_ids=i), (q, k, v))

        def twice(xi: Any, keys: Any, slots: Any, beta: Any) -> Any:
            for alpha in (0.5, 1.0):
                xi = hopfield.retrieve(xi, keys, slots, beta, alpha=alpha, document_ids=ids)
            return xi

        cases[f"retrieval from context, {name}"] = (
            lambda xi, k, b, f=twice: f(xi, k, None, b), (q, keys, beta))
        cases[f"retrieval from both, {name}"] = (twice, (q, keys, slots, beta))
        cases[f"retrieval from slots, {name}"] = (
            lambda xi, s, b, f=twice: f(xi, None, s, b), (q, slots, beta))
    cases["energy"] = (lambda xi, k, s, b: hopfield.energy(xi, k, s, b, ids),
                       (normal(B, T, H, WIDTH), normal(B, T, H, WIDTH), slots, beta))
    cases["convolution"] = (
        lambda x, k, b: causal_conv.causal_conv(x, k, b, document_ids_BT=ids),
        (x, normal(4, E), normal(E)))
    cases["convolution that reaches over a whole shard"] = (
        lambda x, k, b: causal_conv.causal_conv(x, k, b), (x, normal(9, E), normal(E)))

    tokens = jnp.asarray(draw.integers(0, V, (B, T)).astype(np.int32))
    for name, exchange in (("its rows exchanged", 1.0), ("gathered", 0.0)):
        cases[f"embedding, {name}"] = (
            lambda table, exchange=exchange: embedding.embed(
                table, tokens, exchange_below=exchange),
            (normal(V, E),))

    def cell(z: Any, args: tuple) -> Any:
        decay, u, mixing = args
        past = linear_scan.linear_scan(decay, z * (1 - decay), None, reset)
        return jnp.tanh(past @ mixing + u)

    cases["fixed point"] = (
        lambda *args: fixed_point.fixed_point(
            cell, jnp.zeros((B, T, E)), args, document_ids=jnp.cumsum(reset, 1), tol=1e-6,
            backward_tol=1e-6).value, (a, x, normal(E, E) * 0.2))
    return cases


def values_and_gradients(cases: dict[str, tuple[Callable, tuple]]) -> dict[str, Any]:
    """Of every op, at a cotangent that differs everywhere."""
    import jax
    import jax.numpy as jnp

    found = {}
    for name, (op, arguments) in cases.items():
        y, pull = jax.vjp(op, *arguments)
        found[name] = (y, pull(jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)))
    return found


def distances(shapes: list[list[int]]) -> dict[str, dict[str, float]]:
    """Per mesh and op."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from hippocampus.config import MeshConfig
    from hippocampus.training.sharding import make_mesh, on_mesh

    cases = ops()

    def compute(arguments: dict[str, tuple]) -> dict[str, Any]:
        return values_and_gradients({name: (cases[name][0], own)
                                     for name, own in arguments.items()})

    arguments = {name: own for name, (_, own) in cases.items()}
    wanted = jax.jit(compute)(arguments)
    found = {}
    for shape in shapes:
        mesh = make_mesh(MeshConfig(0, *shape), jax.devices()[:int(np.prod(shape))])
        tokens = NamedSharding(mesh, PartitionSpec(None, "sequence"))
        placed = jax.tree.map(lambda array, mesh=mesh, tokens=tokens: jax.device_put(
            array, tokens if array.shape[:2] == (B, T) else NamedSharding(mesh, PartitionSpec())),
            arguments)
        here = jax.jit(on_mesh(compute, mesh))(placed)
        found[str(tuple(shape))] = {
            name: _distance(here[name], wanted[name]) for name in cases}
    return found


def _distance(tree: Any, wanted: Any) -> float:
    """The largest of any leaf; float32 parameters of bfloat16 states are as coarse as those."""
    import jax
    import numpy as np

    leaves, others = ([np.asarray(leaf) for leaf in jax.tree.leaves(t)] for t in (tree, wanted))
    epsilon = max(float(jax.numpy.finfo(leaf.dtype).eps) for leaf in others)
    return max(float(abs(a.astype(np.float32) - b.astype(np.float32)).max())
               / (epsilon * float(abs(b.astype(np.float32)).max()))
               for a, b in zip(leaves, others, strict=True))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(distances(json.loads(sys.argv[1]))))
