"""Where arrays lie, and that it does not change what is computed."""

import itertools
import json
import math
import re
from pathlib import Path

import eight_devices
import jax
import jax.numpy as jnp
import pytest
import tiny_run
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from hippocampus.config import MeshConfig
from hippocampus.devices import resolve
from hippocampus.errors import ConfigError
from hippocampus.models.build_model import build_model, parameter_shapes
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.sharding import (
    check_batch,
    gathers_once,
    make_mesh,
    on_mesh,
    path_name,
    process_rows,
    tree_shardings,
)
from hippocampus.training.step import sharded_init, train_step

SCRIPT = Path(eight_devices.__file__)
# (data, fsdp, tensor, sequence)
MESHES = {"data=8": ("attention", (8, 1, 1, 1)),
          "fsdp=4": ("gathered_once", (1, 4, 1, 1)),
          "fsdp=4, gathered where used": ("gathered_where_used", (1, 4, 1, 1)),
          "fsdp=2 tensor=2 sequence=2": ("everything", (1, 2, 2, 2)),
          "of an equilibrium": ("equilibrium", (1, 2, 2, 2)),
          "of a chopt": ("chopt", (4, 2, 1, 1)), "of a buu": ("buu_packed", (2, 4, 1, 1))}
SIZES = (1, 2, 4, 8)
EVERY_SHAPE = [axes for axes in itertools.product(SIZES, repeat=4) if math.prod(axes) in (2, 4, 8)]
SHAPES_OF_PACKED = [(1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2), (2, 2, 2, 1), (2, 2, 1, 2),
                    (2, 1, 1, 4), (4, 1, 1, 2)]


@pytest.fixture(scope="module")
def found() -> dict:
    return eight_devices.on_eight_devices(SCRIPT, json.dumps(MESHES))[0]


def assert_like_one_device(case: dict) -> None:
    assert case["wanted"][0] != case["wanted"][-1]
    for row, wanted in zip(case["losses"], case["wanted"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    # Parameters, their average and moments of every leaf, relative to its largest value.
    assert case["worst"][1] < 2e-5, case["worst"]


@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_give_the_losses_gradients_and_parameters_of_one(found, mesh):
    assert_like_one_device(found[mesh])


def test_parameters_are_gathered_once_a_step_and_not_by_every_use(found):
    once, used = found["fsdp=4"], found["fsdp=4, gathered where used"]
    cut = [name for name, (whole, shard) in once["shards"].items()
           if name.startswith("params/") and shard < whole]
    # A mixer of one path reads nothing; the backward pass of a micro-batch gathers again.
    read = [name for name in cut if "mixer" not in name]
    assert once["gathers"] == len(read) < used["gathers"]
    assert used["shards"] == once["shards"]


@pytest.mark.full
@pytest.mark.parametrize("axes", EVERY_SHAPE, ids=str)
def test_every_shape_of_mesh_gives_the_numbers_of_one_device(axes):
    cases = {"a": ("everything", axes)}
    if axes in SHAPES_OF_PACKED:  # two micro-batches of four rows
        cases["b"] = ("packed", axes)
    if axes in ((1, 2, 2, 2), (2, 1, 1, 4)):
        cases |= {kind: (kind, axes) for kind in ("s6", "ssd")}
    if axes in ((1, 2, 2, 2), (2, 2, 1, 2)):  # two micro-batches of four rows here too
        cases["c"] = ("equilibrium_packed", axes)
    found, stderr = eight_devices.on_eight_devices(SCRIPT, json.dumps(cases))
    for case in found.values():
        assert_like_one_device(case)
    # Two heads cannot be cut four ways: XLA then copies the gates' small matrix whole.
    if axes[2] <= 2:
        assert "full rematerialization" not in stderr, stderr[-2000:]


def test_no_array_is_copied_whole_to_every_device_to_change_its_layout():
    _, stderr = eight_devices.on_eight_devices(SCRIPT, json.dumps(MESHES))
    assert "full rematerialization" not in stderr, stderr[-2000:]


@pytest.mark.parametrize(("mesh", "ways"), [
    ("data=8", 1), ("fsdp=2 tensor=2 sequence=2", 4)])
def test_parameters_their_average_and_moments_are_spread_over_the_mesh(found, mesh, ways):
    shards = found[mesh]["shards"]
    for part in ("params", "mu", "ema"):
        for name in ("embedding", "layers_0/attention/query/kernel",
                     "layers_0/attention/out/kernel", "layers_0/mlp/down/kernel"):
            whole, shard = shards[f"{part}/{name}"]
            assert shard * ways == whole, f"{part}/{name}"
        whole, shard = shards[f"{part}/norm_out/scale"]
        assert whole == shard


def test_memories_are_spread_by_user(found):
    shards = found["of a chopt"]["shards"]
    kept = {name: sizes for name, sizes in shards.items() if name.startswith("carried/")}
    assert any("keys_BSHd" in name for name in kept)
    for name, (whole, shard) in kept.items():
        assert shard * 8 == whole, name
    assert not any("backbone" in name for name in shards)  # which is not trained


def test_adapters_are_sharded_and_a_frozen_decoder_has_no_moments(found):
    shards = found["of a buu"]["shards"]
    assert not any("backbone" in name for name in shards)
    for part in ("params", "ema", "mu"):
        for name in ("ssm/in/kernel", "memory/key_slots", "out/kernel"):
            whole, shard = shards[f"{part}/adapters/layers_1/{name}"]
            assert whole == 4 * shard, name


@pytest.mark.parametrize(("mesh", "shard"), [
    ("data=8", [1, 16]), ("fsdp=2 tensor=2 sequence=2", [4, 8])])
def test_rows_are_spread_over_data_and_fsdp_and_tokens_over_sequence(found, mesh, shard):
    assert found[mesh]["shard"] == shard


# ---------------------------------------------------------------- one device

def one_device_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.mark.parametrize("axes", [{"data": 2}, {"fsdp": 2}, {"tensor": 4}, {"sequence": 2},
                                  {"data": 3, "fsdp": 5}])
def test_mesh_that_is_not_the_number_of_devices_is_refused(axes):
    with pytest.raises(ConfigError, match="is not the number of devices, 1") as caught:
        make_mesh(MeshConfig(**axes), jax.devices()[:1])
    assert "mesh.data=-1" in caught.value.hint


def test_another_number_of_devices_than_expected_is_refused():
    assert make_mesh(MeshConfig(devices=1), jax.devices()[:1]).size == 1
    with pytest.raises(ConfigError, match="8 devices are expected, but JAX sees 1") as caught:
        make_mesh(MeshConfig(devices=8), jax.devices()[:1])
    assert "--expect_devices" in caught.value.hint


def test_batch_that_does_not_divide_is_refused_with_both_numbers():
    class Eight:
        shape = {"data": 4, "fsdp": 2}  # noqa: RUF012

    with pytest.raises(ConfigError, match="= 12 does not divide over 8 devices"):
        check_batch(Eight(), 12, "train.batch_size")


def test_context_that_does_not_divide_over_the_sequence_axis_is_refused():
    with pytest.raises(ConfigError, match=r"data\.context = 16 is not a multiple of mesh\.seq"):
        tiny_run.config(mesh__sequence=3)


def test_one_process_reads_every_row():
    assert process_rows(one_device_mesh(), 12) == slice(0, 12)


def test_one_device_computes_the_step_without_one_operation_more():
    config, _ = resolve(tiny_run.config(**eight_devices.MODELS["packed"]))
    model, optimizer = build_model(config), build_optimizer(config.optimizer, 10)
    step = train_step(model, optimizer, config)
    from hippocampus.training.state import init_state

    state = jax.eval_shape(lambda: init_state(model, optimizer, config))
    batch = eight_devices.batch(config, 0, True)
    assert on_mesh(step, one_device_mesh()) is step
    operations = str(jax.make_jaxpr(step)(state, batch))
    assert "sharding_constraint" not in operations and "shard_map" not in operations


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


@pytest.mark.parametrize(("gather", "size", "axes", "once"), [
    ("small", 2**28, {"fsdp": 2}, True), ("small", 2**28 + 1, {"fsdp": 2}, False),
    ("step", 2**40, {"fsdp": 2}, True), ("use", 1, {"fsdp": 2}, False),
    ("step", 1, {"data": 2}, False)])
def test_small_parameters_are_gathered_once_where_they_are_spread(gather, size, axes, once):
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,))
    params = {"kernel": jax.ShapeDtypeStruct((size,), jnp.float32)}
    with jax.sharding.use_abstract_mesh(mesh):
        assert gathers_once(MeshConfig(gather=gather), params) is once


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


# ---------------------------------------------------------------- the rules of the config

class Mesh222(Mesh4):
    shape = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}  # noqa: RUF012


# Parameters that lie whole on every device, and why.
WHOLE = {
    r"scale$|bias$|log_beta$|time_kernel$|skip$": "vectors: less than a thousandth of a matrix",
    r"(ssm/log_decay|ssm/input_scale)$": "a vector in the gated kind and in SSD",
}

WHOLE_OF_A_CELL = {
    r"part_scale$": "three vectors", r"mixer/log_decay$": "a vector in SSD",
    r"ssm/log_decay$": "a vector in the gated kind"}

OF_KIND = {"gated": ("conv_kernel", "gates/kernel"), "diagonal": ("conv_kernel", "log_decay"),
           "s6": ("conv_kernel", "select/kernel", "step/kernel", "log_decay"),
           "ssd": ("conv_kernel",),
           "gru": ("recurrent_kernel",)}


def placed(monkeypatch, config) -> tuple[dict, dict]:
    """Parameters (shape, axes) by name: those that some axis cuts, and those that none does."""
    monkeypatch.setattr("hippocampus.training.sharding.NamedSharding", lambda mesh, spec: spec)
    shapes = parameter_shapes(build_model(config))
    specs = jax.tree.leaves_with_path(tree_shardings(Mesh222(), shapes, config.mesh.rules),
                                      is_leaf=lambda x: isinstance(x, P))
    spread, whole = {}, {}
    for (path, spec), leaf in zip(specs, jax.tree.leaves(shapes), strict=True):
        axes = {axis for part in spec if part for axis in
                ((part,) if isinstance(part, str) else part)}
        (spread if axes else whole)[path_name(path)] = (leaf, axes)
    return spread, whole


@pytest.mark.parametrize("kind", ["s6", "ssd"])
def test_every_parameter_of_an_equilibrium_model_but_vectors_is_spread(monkeypatch, kind):
    config, _ = resolve(tiny_run.config(
        model__family="equilibrium", model__d_model=256, model__n_heads=4, model__ssm__kind=kind,
        model__cell__mlp__width=512, model__hopfield__patterns="both",
        model__hopfield__n_slots=512, model__tie_embeddings=False, model__ssm__d_state=16,
        model__vocab_size=30_000))
    spread, whole = placed(monkeypatch, config)
    for name in ("embedding", "head", "out/kernel", "cell/slots", "cell/inject/kernel",
                 "cell/key/kernel", "cell/ssm/gates/kernel", "cell/mlp/down/kernel",
                 *("layers_0/mixer/" + name for name in OF_KIND[kind])):
        assert spread[name][1] == {"fsdp", "tensor"}, name
    for name, (leaf, _) in whole.items():
        assert any(re.search(pattern, name) for pattern in (*WHOLE, *WHOLE_OF_A_CELL)), name
        assert leaf.size < 2048, name


def test_what_a_model_carries_lies_where_its_rows_lie():
    config, _ = resolve(tiny_run.config(**eight_devices.MODELS["equilibrium"]))
    optimizer = build_optimizer(config.optimizer, 10)
    _, like, shardings = sharded_init(build_model(config), optimizer, config, one_device_mesh())
    assert like.carried["z_last"].shape == (config.train.batch_size, 2 * config.model.d_model)
    assert shardings.carried["z_last"].spec == P(("data", "fsdp"))


@pytest.mark.parametrize("kind", OF_KIND)
def test_every_parameter_but_vectors_is_spread_over_fsdp_and_tensor(monkeypatch, kind):
    config, _ = resolve(tiny_run.config(
        model__d_model=256, model__n_heads=4, model__mixer__width=32, model__mlp__width=512,
        model__segments__controller_width=32, model__vocab_size=30_000, model__ssm__kind=kind,
        model__ssm__input_scale=kind not in ("s6", "ssd"), loss__rectified_flow__segment_weight=0.1,
        model__embedding_width=8,
        **{**eight_devices.MODELS["everything"], "model__hopfield__n_slots": 64}))
    spread, whole = placed(monkeypatch, config)
    for name in ("embedding", "head", "embedding_up/kernel", "head_down", "position_embedding",
                 "layers_0/ssm/in/kernel", "layers_0/hopfield/slots",
                 "layers_0/mixer/hidden/kernel",
                 "reasoner/controller/hidden/kernel", "reasoner/feedback/kernel",
                 "flow/hidden/kernel", "flow/out/kernel", "layers_0/mlp/up/kernel",
                 *("layers_0/ssm/" + name for name in OF_KIND[kind])):
        assert name in spread, name
    for name, (leaf, _) in whole.items():
        assert any(re.search(pattern, name) for pattern in WHOLE), name
        assert leaf.size < 2048 and max(leaf.shape) == leaf.size, name
    for name, (leaf, axes) in spread.items():
        # A gate per path or depth is too narrow for both axes and has one.
        assert axes == {"fsdp", "tensor"} or leaf.shape[-1] in (2, 3), name


@pytest.mark.parametrize(("shape", "spec"), [
    ((16, 12), P(("tensor", "fsdp"), None)), ((6, 12), P("tensor", "fsdp")),
    ((5, 12), P(None, "fsdp")), ((12, 16), P("tensor", "fsdp")), ((5, 7), P(None, None))])
def test_an_axis_named_twice_goes_to_the_first_dimension_that_it_divides(monkeypatch, shape, spec):
    monkeypatch.setattr("hippocampus.training.sharding.NamedSharding", lambda mesh, spec: spec)
    tree = {"head": jax.ShapeDtypeStruct(shape, jnp.float32)}
    (found,) = jax.tree.leaves(tree_shardings(Mesh4(), tree, MeshConfig().rules),
                               is_leaf=lambda x: isinstance(x, P))
    assert found == spec


def test_axes_joined_by_a_plus_share_one_dimension(monkeypatch):
    monkeypatch.setattr("hippocampus.training.sharding.NamedSharding", lambda mesh, spec: spec)
    rules = ((r"w$", "-,tensor+fsdp"),)
    for size, wanted in ((16, P(None, ("tensor", "fsdp"))), (6, P(None, "tensor")),
                         (5, P(None, None))):
        tree = {"w": jax.ShapeDtypeStruct((3, size), jnp.float32)}
        assert jax.tree.leaves(tree_shardings(Mesh4(), tree, rules),
                               is_leaf=lambda x: isinstance(x, P)) == [wanted]
