"""Where arrays lie, and that it does not change what is computed."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny_run
from jax.sharding import PartitionSpec as P

from hippocampus.config import MeshConfig
from hippocampus.errors import ConfigError
from hippocampus.training.optimizer import build_optimizer, path_name
from hippocampus.training.sharding import check_batch, make_mesh, tree_shardings

MESHES = {"data=8": {"data": 8}, "data=4 fsdp=2": {"data": 4, "fsdp": 2}, "fsdp=8": {"fsdp": 8},
          "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2}}
STEPS = 5

# Runs below, in a process with eight virtual devices; prints one JSON object.
EIGHT = """
import json, sys
import jax, numpy as np
import tiny_run
from hippocampus.config import MeshConfig
from hippocampus.data.batches import ShuffledWindows
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError
from hippocampus.models.build_model import build_model
from hippocampus.training import sharding
from hippocampus.training.optimizer import build_optimizer, path_name
from hippocampus.training.step import jit_train_step, sharded_init, train_step

config, _ = resolve(tiny_run.config())
model, optimizer = build_model(config), build_optimizer(config.optimizer, config.train.steps)
ids = (np.arange(3000) * 7919 % 6101 % 256).astype(np.int32)
batches = ShuffledWindows(ids, config.data.context, config.train.batch_size, 0)

def train(mesh):
    make, _, shardings = sharded_init(model, optimizer, config, mesh)
    state, losses = make(), []
    step = jit_train_step(train_step(model, optimizer, config), mesh, shardings)
    with jax.set_mesh(mesh):
        for n in range(5):
            batch = sharding.to_devices(batches.batch(n), sharding.batch_sharding(mesh))
            state, metrics = step(state, batch)
            losses.append([float(metrics[m]) for m in ("train/loss", "train/grad_norm")])
    shards = {}
    for name, tree in (("params", state.params), ("mu", state.opt_state[1][0].mu),
                       ("ema", state.ema)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            shard = leaf.addressable_shards[0].data
            shards[f"{name}/{path_name(path)}"] = [leaf.size, shard.size]
    rows = batch.tokens_BT.addressable_shards[0].data.shape[0]
    return {"losses": losses, "shards": shards, "rows": rows}

def refused(call):
    try:
        call()
    except ConfigError as error:
        return error.message

eight = jax.devices()
meshes = json.loads(sys.argv[1])
mesh = sharding.make_mesh(MeshConfig())
print(json.dumps({
    "devices": len(eight),
    "one": train(sharding.make_mesh(MeshConfig(), eight[:1])),
    "runs": {name: train(sharding.make_mesh(MeshConfig(**axes))) for name, axes in meshes.items()},
    "batch": refused(lambda: sharding.check_batch(mesh, 12, "train.batch_size")),
    "mesh": refused(lambda: sharding.make_mesh(MeshConfig(data=3))),
    "fixed": refused(lambda: sharding.make_mesh(MeshConfig(fsdp=3)))}))
"""


@functools.cache
def eight_devices() -> dict:
    env = {**tiny_run.environment(), "XLA_FLAGS": (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")}
    env["PYTHONPATH"] += f":{tiny_run.ROOT / 'tests'}"
    done = subprocess.run([sys.executable, "-c", EIGHT, json.dumps(MESHES)], env=env, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> dict:
    return eight_devices()


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_losses_of_one(found, mesh):
    assert found["devices"] == 8
    one, other = found["one"]["losses"], found["runs"][mesh]["losses"]
    assert len(one) == STEPS and one[0] != one[-1]
    for row, wanted in zip(other, one, strict=True):
        assert row[0] == pytest.approx(wanted[0], rel=1e-5)
        assert row[1] == pytest.approx(wanted[1], rel=1e-4)


@pytest.mark.parametrize(("mesh", "ways"), [("data=8", 1), ("data=4 fsdp=2", 2), ("fsdp=8", 8),
                                            ("data=2 fsdp=2 tensor=2", 4)])
def test_parameters_their_average_and_moments_are_spread_over_the_mesh(found, mesh, ways):
    shards = found["runs"][mesh]["shards"]
    for part in ("params", "mu", "ema"):
        for name in ("embedding", "layers_0/attention/query/kernel",
                     "layers_0/attention/out/kernel", "layers_0/mlp/down/kernel"):
            whole, shard = shards[f"{part}/{name}"]
            assert shard * ways == whole, f"{part}/{name}"
        whole, shard = shards[f"{part}/norm_out/scale"]
        assert whole == shard


@pytest.mark.parametrize(("mesh", "rows"), [("data=8", 1), ("data=4 fsdp=2", 1), ("fsdp=8", 1),
                                            ("data=2 fsdp=2 tensor=2", 2)])
def test_rows_of_a_batch_are_spread_over_data_and_fsdp(found, mesh, rows):
    assert found["runs"][mesh]["rows"] == rows


def test_what_does_not_divide_eight_devices_is_refused(found):
    assert found["batch"] == "train.batch_size = 12 does not divide over 8 devices"
    assert found["mesh"].startswith("mesh.data=3 * mesh.fsdp=1") and "8" in found["mesh"]
    assert found["fixed"].endswith("is not the number of devices, 8")


# ---------------------------------------------------------------- one device

def one_device_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("axes", [{"data": 2}, {"fsdp": 2}, {"tensor": 4}, {"data": 3, "fsdp": 5}])
def test_mesh_that_is_not_the_number_of_devices_is_refused(axes):
    with pytest.raises(ConfigError, match="is not the number of devices, 1") as caught:
        make_mesh(MeshConfig(**axes), jax.devices()[:1])
    assert "mesh.data=-1" in caught.value.hint


def test_micro_batches_count_in_what_a_batch_must_divide_by():
    check_batch(one_device_mesh(), 12, "train.batch_size", 4)
    with pytest.raises(ConfigError) as caught:
        check_batch(one_device_mesh(), 10, "train.batch_size", 4)
    assert caught.value.message == (
        "train.batch_size = 10 does not divide over 1 devices * 4 micro-batches")
    assert caught.value.hint == "the nearest multiple is 8"


class Mesh4:
    """Enough of a mesh to ask where an array would lie: no device is needed."""

    shape = {"data": 1, "fsdp": 4, "tensor": 2, "sequence": 1}  # noqa: RUF012


RULES = ((r"embedding$", "tensor,fsdp"), (r"out/kernel$", "tensor,-"), (r"kernel$", "fsdp,tensor"))


@pytest.mark.parametrize(("name", "shape", "spec"), [
    ("embedding", (128, 16), P("tensor", "fsdp")),
    ("layers_0/out/kernel", (6, 16), P("tensor", None)),
    ("layers_0/in/kernel", (16, 6), P("fsdp", "tensor")),
    ("layers_0/in/kernel", (6, 6), P(None, "tensor")),
    ("layers_0/in/kernel", (5, 7), P(None, None)),
    ("layers_0/in/kernel", (3, 16, 6), P(None, "fsdp", "tensor")),
    ("layers_0/in/kernel", (16,), P()),
    ("layers_0/in/bias", (16,), P()),
])
def test_first_rule_that_matches_places_the_last_dimensions(monkeypatch, name, shape, spec):
    monkeypatch.setattr("hippocampus.training.sharding.NamedSharding", lambda mesh, spec: spec)
    *groups, last = name.split("/")
    tree = {last: jax.ShapeDtypeStruct(shape, jnp.float32)}
    for group in reversed(groups):
        tree = {group: tree}
    placed = tree_shardings(Mesh4(), tree, RULES)
    (found,) = jax.tree.leaves(placed, is_leaf=lambda x: isinstance(x, P))
    assert found == spec


def test_optimizer_moments_lie_where_their_parameters_lie(monkeypatch):
    monkeypatch.setattr("hippocampus.training.sharding.NamedSharding", lambda mesh, spec: spec)
    config = tiny_run.config()
    params = {"layers_0": {"in": {"kernel": jnp.zeros((16, 6)), "bias": jnp.zeros(6)}},
              "embedding": jnp.zeros((128, 16))}
    state = build_optimizer(config.optimizer, 10).init(params)
    placed = jax.tree.leaves_with_path(tree_shardings(Mesh4(), state, RULES),
                                       is_leaf=lambda x: isinstance(x, P))
    moments = {path_name(path): spec for path, spec in placed}
    of_parameters = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(
        tree_shardings(Mesh4(), params, RULES), is_leaf=lambda x: isinstance(x, P))}
    assert of_parameters["layers_0/in/kernel"] == P("fsdp", "tensor")
    for name, spec in of_parameters.items():
        found = [s for path, s in moments.items() if path.endswith(f"/{name}")]
        assert found == [spec, spec], name  # first and second moment
    assert all(spec == P() for path, spec in moments.items() if path.endswith("count"))
