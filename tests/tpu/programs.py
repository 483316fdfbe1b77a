"""Compiles generation and the probes for one chip of a TPU; prints what they need as JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hippocampus.config_files import load_config
from hippocampus.data.batches import Batch
from hippocampus.devices import resolve
from hippocampus.generation import decode
from hippocampus.generation.sampling import SamplerSettings
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.models.interventions import Interventions
from hippocampus.planning.topology import compile_only_devices, find_topology, prepare_environment
from hippocampus.probing import probe


def main(config_file: str, topology_name: str, batch: int, changes: dict) -> None:
    """Prints one object: seconds and bytes of the decode loop, of reading a chunk, of a probe."""
    prepare_environment()
    topology = find_topology(topology_name)
    config, _ = resolve(load_config(config_file, changes), topology.device)
    model = build_model(config, topology.device)
    chip = compile_only_devices(topology)[0]
    here = NamedSharding(Mesh(np.array([chip]), ("x",)), PartitionSpec())

    def there(tree):
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree)

    params = parameter_shapes(model)
    variables = there({"params": jax.eval_shape(model.decode_params, params)})
    state = there(jax.eval_shape(lambda: decode._empty.__wrapped__(
        model, variables, batch, config.data.context, None)))
    settings = SamplerSettings(*(there(jnp.zeros((), jnp.int32 if name == "top_k" else jnp.float32))
                                 for name in SamplerSettings._fields))
    number = there(jnp.int32(0))
    chunk = there(jnp.zeros((batch, decode.CHUNKS[0]), jnp.int32))
    valid = there(jnp.zeros((batch, decode.CHUNKS[0]), bool))
    seeds = there(jnp.zeros((batch,), jnp.uint32))
    tokens = jnp.zeros((batch, config.data.context), jnp.int32)
    probed = there(Batch(tokens, tokens, jnp.ones(tokens.shape)))
    neutral = there(Interventions.neutral(
        config.model.n_layers, *tokens.shape, config.model.segments.train))
    write = jax.jit(decode._write, static_argnums=0, static_argnames="skip", donate_argnums=2)
    found = {}
    for name, traced in {
        "write": write.trace(model, variables, state, seeds, settings, number, number, skip=False),
        "read": decode._read.trace(model, variables, state, chunk, valid, skip=False),
        "probe": probe._sums.trace(model, there(params), probed, neutral),
    }.items():
        begin = time.monotonic()
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        memory = compiled.memory_analysis()
        found[name] = {
            "seconds": time.monotonic() - begin, "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
