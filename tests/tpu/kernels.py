"""Compiles the TPU kernels for slices that are not here; prints what came of it as JSON."""

import json
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from hippocampus.config import MeshConfig
from hippocampus.ops import placement
from hippocampus.ops.attention import attention
from hippocampus.ops.kernels import scan_tpu
from hippocampus.planning.hlo import parse
from hippocampus.planning.topology import compile_only_devices, find_topology, prepare_environment
from hippocampus.planning.traffic import traffic
from hippocampus.training import sharding

T, E = 512, 256
H, G, D_HEAD, CONTEXT = 6, 2, 128, 1024
BTE = ("batch", None, "tensor")
LIES = ((None, *BTE), BTE, ("tensor",), ("tensor",), ("batch", None))
F32, BF16 = jnp.float32, jnp.bfloat16


def scans(n: int, rows: int, dtype) -> Iterator[tuple[str, Callable, list, tuple, tuple]]:
    """Name, function of one device's arrays, these, and how they and the results lie."""
    x, h = ((n * rows, T, E), dtype), ((n * rows, T, E), F32)
    gates = [((2, *x[0]), dtype), x, ((E,), F32), ((E,), F32), (x[0][:2], jnp.bool_)]
    yield "scan", scan_tpu.scan, [x] * 2, (BTE,) * 2, (BTE,)
    yield "scan_backward", scan_tpu.scan_backward, [x] * 3, (BTE,) * 3, (BTE, BTE)
    yield "gated_scan", scan_tpu.gated_scan, gates, LIES, (BTE,)
    yield ("gated_scan_backward", scan_tpu.gated_scan_backward, [*gates, h, h], (*LIES, BTE, BTE),
           (LIES[0], BTE, ("batch", "tensor"), ("batch", "tensor")))


def attend(backend: str) -> Callable:
    """Attention with its gradients."""
    def run(q, k, v, ids, g):
        o, vjp = jax.vjp(lambda *qkv: attention(
            *qkv, document_ids=ids, backend=backend), q, k, v)
        return o, vjp(g)

    return run


def programs(n: int) -> Iterator[tuple[str, Callable, list]]:
    """Everything that is compiled for a slice of n devices."""
    for rows, dtype in ((8, F32), (4, BF16)):
        for name, function, arrays, lies, results in scans(n, rows, dtype):
            def run(*arrays, function=function, lies=lies, results=results):
                return placement.map_local(function, arrays, lies, *results)

            yield f"{name} {jnp.dtype(dtype).name}", run, arrays
    q, k = (((n * 8, CONTEXT, heads, D_HEAD), BF16) for heads in (H, G))
    for backend in ("flash", "xla"):
        yield backend, attend(backend), [q, k, k, ((n * 8, CONTEXT), jnp.int32), q]


def compiled(mesh, function: Callable, arrays: list) -> dict:
    """Kernels, bytes through the memory and bytes sent, or the compiler's refusal."""
    def there(shape, dtype):
        batch = 1 if len(shape) == 4 and shape[0] == 2 else 0
        cut = [None] * len(shape)
        if len(shape) > 1:
            cut[batch] = ("data", "fsdp")
        return jax.ShapeDtypeStruct(shape, dtype,
                                    sharding=NamedSharding(mesh, PartitionSpec(*cut)))

    try:
        with jax.set_mesh(mesh):
            program = jax.jit(function).trace(*(there(*a) for a in arrays)).lower(
                lowering_platforms=("tpu",)).compile()
    except Exception as error:
        return {"error": str(error)}
    text = program.as_text()
    moved = traffic(parse(text))
    return {"kernels": text.count('custom_call_target="tpu_custom_call"'), "memory": moved.memory,
            "sent": sum(moved.sent.values())}


def main(names: list[str]) -> None:
    """Prints one object: slice -> program -> what came of it."""
    prepare_environment()
    found = {}
    for name in names:
        devices = compile_only_devices(find_topology(name))
        mesh = sharding.make_mesh(MeshConfig(), devices)
        found[name] = {label: compiled(mesh, function, arrays)
                       for label, function, arrays in programs(len(devices))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
