"""Plans: names of machines, the arithmetic of the bound, errors, and what is printed."""

import dataclasses
import json
import math
import re
import types

import pytest
import tiny_run

import hippocampus.plan
from hippocampus.devices import Device, chip
from hippocampus.errors import ConfigError
from hippocampus.models.flops import training_flops_per_token
from hippocampus.planning import plan as planning
from hippocampus.planning import topology as topologies
from hippocampus.planning.compile import CompiledStep, Memory, largest_batch, out_of_memory
from hippocampus.planning.report import describe
from hippocampus.planning.roofline import mfu, roofline
from hippocampus.planning.topology import find_topology
from hippocampus.planning.traffic import COLLECTIVES, Traffic
from hippocampus.verbs import run_verb

GIB = 2**30


def outcome(capsys, *arguments: str) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of the verb."""
    with pytest.raises(SystemExit) as caught:
        run_verb(hippocampus.plan.main, list(arguments))
    out, err = capsys.readouterr()
    return caught.value.code, out, err.splitlines()


def config_file(tmp_path, **changes) -> str:
    path = tmp_path / "tiny.py"
    values = {**tiny_run.TINY, **{k.replace("__", "."): v for k, v in changes.items()}}
    path.write_text("from hippocampus.config_files import defaults\n\n\ndef get_config():\n"
                    "    config = defaults()\n" + "".join(
                        f"    config.{name} = {value!r}\n" for name, value in values.items())
                    + "    return config\n")
    return f"--config={path}"


# ---------------------------------------------------------------- names

@pytest.mark.parametrize(("name", "kind", "devices", "links"), [
    ("v3:2x2", "TPU v3", 8, 2), ("v2:4x4", "TPU v2", 32, 4), ("v4:2x2x1", "TPU v4", 4, 2),
    ("v4:4x4x4", "TPU v4", 64, 6), ("v5e:1x1", "TPU v5 lite", 1, 0),
    ("v5e:2x4", "TPU v5 lite", 8, 3), ("v5e:16x16", "TPU v5 lite", 256, 4),
    ("v5p:2x2x2", "TPU v5", 8, 3), ("v6e:2x2", "TPU v6 lite", 4, 2), ("V4:2x2x1", "TPU v4", 4, 2),
    ("v3-8", "TPU v3", 8, 2), ("v4-8", "TPU v4", 4, 2), ("v5litepod-16", "TPU v5 lite", 16, 4),
    ("v5e-256", "TPU v5 lite", 256, 4), ("v6e-8", "TPU v6 lite", 8, 3), ("v5p-8", "TPU v5", 4, 2),
    ("h100x8", "NVIDIA H100 80GB HBM3", 8, 1), ("h100", "NVIDIA H100 80GB HBM3", 1, 0),
    ("a100-40gbx4", "NVIDIA A100-SXM4-40GB", 4, 1), ("t4x1", "Tesla T4", 1, 0),
])
def test_devices_and_links_of_a_name(name, kind, devices, links):
    found = find_topology(name)
    assert (found.device.kind, found.n_devices, found.links) == (kind, devices, links)


@pytest.mark.parametrize(("name", "hint"), [
    ("v9:2x2", "nearest: v3:2x2, v2:2x2"), ("v5:4x4", "v5e:4x4"), ("h100x64", "h100x8"),
    ("v4:0x2x1", "v4:2x2x1"), ("v4-7", "v4:"), ("tpu", "such as v2:2x2"), ("", "such as v2:2x2"),
    ("b200x8", "h200x8"), ("v4:999x999x999", "v4:"),
])
def test_an_unknown_name_is_refused_with_the_nearest(name, hint):
    with pytest.raises(ConfigError, match=r"^no topology ") as caught:
        find_topology(name)
    assert hint in caught.value.hint


def test_every_name_that_is_offered_is_known():
    for name in topologies.known_names():
        assert find_topology(name).chip.memory_bytes > 0


def test_every_name_in_the_documentation_is_known():
    text = (tiny_run.ROOT / "docs/planning.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]*[x:\d-]+[^`]*)`", row)]
    assert len(names) >= 8 and all(find_topology(name).n_devices for name in names)


@pytest.mark.parametrize(("device", "gib", "bandwidth"), [
    (Device("tpu", "TPU v3"), 16, 450e9), (Device("tpu", "TPU v4"), 32, 1228e9),
    (Device("tpu", "TPU v5 lite"), 16, 819e9), (Device("tpu", "TPU v5"), 95, 2765e9),
    (Device("gpu", "NVIDIA H100 80GB HBM3", 9.0), 74.5, 3.35e12),
])
def test_memory_of_a_chip(device, gib, bandwidth):
    facts = chip(device)
    assert facts.memory_bytes / GIB == pytest.approx(gib, rel=1e-3)
    assert facts.memory_bandwidth == bandwidth


@pytest.mark.parametrize("device", [Device("cpu", "cpu"), Device("tpu", "TPU v99"),
                                    Device("gpu", "NVIDIA B200", 10.0)])
def test_a_chip_that_nobody_looked_up_has_no_figures(device):
    assert chip(device) is None


# ---------------------------------------------------------------- arithmetic

PEAKS = {"peak_flops": 100e12, "memory_bandwidth": 1e12, "link_bandwidth": 100e9}


@pytest.mark.parametrize(("work", "seconds", "by"), [
    ((2e12, 1e9, 1e8), 0.02, "compute"), ((1e10, 5e9, 1e8), 0.005, "memory"),
    ((1e10, 1e9, 3e9), 0.03, "links"), ((1e12, None, None), 0.01, "compute"),
])
def test_the_slowest_part_is_the_bound(work, seconds, by):
    bound = roofline(*work, **PEAKS)
    assert bound.seconds == pytest.approx(seconds) and bound.bound_by == by


def test_what_is_not_known_is_not_a_bound():
    bound = roofline(1e12, 1e9, 1e9, peak_flops=0, memory_bandwidth=1e12, link_bandwidth=0)
    assert (bound.compute, bound.links, bound.bound_by) == (None, None, "memory")
    nothing = roofline(1e12, None, None, peak_flops=0, memory_bandwidth=1, link_bandwidth=0)
    assert nothing.seconds is None and nothing.bound_by == ""


def test_a_step_bound_by_compute_uses_all_of_the_peak():
    bound = roofline(3e12, 1e9, 1e8, **PEAKS)
    assert mfu(3e12, bound.seconds, 100e12) == pytest.approx(1)
    assert mfu(3e12, 2 * bound.seconds, 100e12) == pytest.approx(0.5)


MEMORY = Memory(arguments=4 * GIB, outputs=3 * GIB, aliased=2 * GIB, temporaries=6 * GIB,
                code=GIB)


def test_an_aliased_output_needs_no_memory_of_its_own():
    assert MEMORY.total == (4 + 3 - 2 + 6 + 1) * GIB


@pytest.mark.parametrize(("limit", "batch"), [(12, 64), (17, 128), (14, 88), (7, 0), (6, 0)])
def test_the_largest_batch_fills_what_is_left_with_activations(limit, batch):
    # 5 GiB of the 6 grow with 64 sequences, 7 GiB do not.
    assert largest_batch(MEMORY, GIB, 64, 8, limit * GIB) == batch


# ---------------------------------------------------------------- a full device

V3_ERROR = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 23.22G of 15.48G hbm. Exceeded hbm capacity by 7.74G.

Total hbm usage >= 23.73G:
    reserved        528.00M
    program          19.59G"""


def mesh(**sizes: int):
    return types.SimpleNamespace(shape={"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1, **sizes})


@pytest.mark.parametrize(("changes", "sizes", "hint"), [
    ({"train__batch_size": 64}, {}, "try model.remat=dots, or train.grad_accumulation=2, or a "
     "smaller train.batch_size (it is 64), or mesh.fsdp=8"),
    ({"train__batch_size": 64, "model__remat": "dots"}, {"data": 1, "fsdp": 8},
     "try model.remat=full, or train.grad_accumulation=2, or a smaller"),
    ({"train__batch_size": 8, "model__remat": "full"}, {"data": 1, "fsdp": 8},
     "try a smaller data.context, or more devices"),
])
def test_a_step_that_does_not_fit_says_both_sizes_and_what_to_change(changes, sizes, hint):
    error = out_of_memory(V3_ERROR, tiny_run.config(**changes), mesh(**sizes))
    assert error.message == ("tiny does not fit: it needs 23.22 GiB of each device's usable "
                             "15.48 GiB")
    assert error.hint.startswith(hint) and error.exit_code == 64


def test_a_step_whose_temporaries_alone_are_too_large_says_so():
    text = ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (512.00M) exceeds available HBM (0.25G).")
    error = out_of_memory(text, tiny_run.config(), mesh())
    assert error.message == ("tiny does not fit: temporaries alone need 0.50 GiB of each device's "
                             "usable 0.25 GiB")


def test_a_full_device_whose_sizes_are_not_said_is_one_line_all_the_same():
    error = out_of_memory("RESOURCE_EXHAUSTED: no room\nat all", tiny_run.config(), mesh())
    assert error.message == "tiny does not fit"


def test_another_error_of_the_compiler_is_no_full_device():
    assert out_of_memory("INTERNAL: Mosaic failed", tiny_run.config(), mesh()) is None


# ---------------------------------------------------------------- a plan of GPUs

def test_a_plan_of_gpus_is_arithmetic_and_says_so(tmp_path, capsys):
    code, out, err = outcome(capsys, config_file(tmp_path), "--topology=h100x8",
                             "--config.train.batch_size=16")
    assert code == 0 and err == []
    assert "8 x NVIDIA H100 80GB HBM3, mesh data 8" in out
    assert "no compiler for this device works without one" in out
    assert "256 = 16 sequences of 16" in out and "bound, no measurement" in out


def test_the_json_of_a_plan_has_the_numbers(tmp_path, capsys):
    code, out, _ = outcome(capsys, config_file(tmp_path), "--topology=a100x2", "--json",
                           "--config.model.d_model=32")
    plan = json.loads(out)
    assert code == 0 and plan["compiled"] is None and plan["fits"] is None
    config = tiny_run.config(model__d_model=32)
    flops = training_flops_per_token(config) * 8 * 16
    assert plan["flops_per_step"] == pytest.approx(flops)
    assert plan["bound"]["seconds"] == pytest.approx(flops / 2 / 312e12)
    assert plan["bound"]["tokens_per_second"] == pytest.approx(128 * 2 * 312e12 / flops)
    assert plan["bound"]["mfu"] == pytest.approx(1) and plan["bound"]["by"] == "compute"


def test_sharded_parameters_need_a_share_of_the_memory(tmp_path):
    config = tiny_run.config(model__d_model=64)
    whole, shared = (planning.make_plan(dataclasses.replace(config, mesh=dataclasses.replace(
        config.mesh, fsdp=fsdp)), find_topology("h100x8"), print) for fsdp in (1, 8))
    assert whole.mesh == {"data": 8, "fsdp": 1, "tensor": 1, "sequence": 1}
    assert whole.state_bytes / 8 < shared.state_bytes < whole.state_bytes / 7
    # Parameters, their average and two moments in float32; tables are padded to 256 rows anyway.
    assert whole.state_bytes == pytest.approx(16 * whole.parameters, rel=1e-3)


# ---------------------------------------------------------------- errors

@pytest.mark.parametrize(("arguments", "error"), [
    (["--topology=v9:2x2"], "error: no topology 'v9:2x2'"),
    (["--topology=h100x8", "--config.train.batch_size=12"],
     "error: train.batch_size = 12 does not divide over 8 devices"),
    (["--topology=h100x8", "--config.mesh.fsdp=3"],
     "error: mesh.data=2 * mesh.fsdp=3 * mesh.tensor=1 * mesh.sequence=1 is not the number of "
     "devices, 8"),
    (["--topology=t4x1", "--config.model.attention.backend=cudnn"],
     "error: model.attention.backend is cudnn on Tesla T4"),
    (["--topology=v4:2x2x1", "--config.model.attention.backend=cudnn"],
     "error: model.attention.backend is cudnn on TPU v4"),
    (["--topology=h100x8", "--config.model.depth=3"], "error: model.depth is not a field"),
    ([], "error: the following arguments are required: --topology"),
])
def test_what_does_not_fit_is_one_line_with_a_hint(tmp_path, capsys, arguments, error):
    code, out, err = outcome(capsys, config_file(tmp_path), *arguments)
    assert (code, out, err[0], len(err)) == (64, "", error, 2)
    assert err[1].startswith("hint: ")


def test_without_libtpu_one_line_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topologies, "has_compiler", lambda: False)
    code, out, err = outcome(capsys, config_file(tmp_path), "--topology=v3:2x2")
    assert (code, out) == (64, "")
    assert err == ["error: compiling for TPU v3 needs libtpu, which is not installed",
                   "hint: pip install '.[plan]' (about 700 MB; no TPU is needed)"]


REFUSED = {
    "v5e:1x1": ('Topology layout "v5e:1x1" is not divisible by the given (or default) '
                'chips_per_host_bounds "2x2x1"', "use v5e:2x2"),
    "v5e:3x3": ('INVALID_ARGUMENT: Topology layout "v5e:3x3" is not divisible by the given',
                "a slice is made of hosts of 2x2 chips; nearest: v5e:"),
    "v4:2x2x1": ("The TPU is already in use by process with pid 7. Not attempting to load "
                 "libtpu.so", "ALLOW_MULTIPLE_LIBTPU_LOAD=1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_libtpu_refuses_is_one_line_with_a_way_out(name, monkeypatch):
    from jax.experimental import topologies as jax_topologies

    text, hint = REFUSED[name]

    def refuse(**_):
        raise RuntimeError(text + "\nand a trace")

    monkeypatch.setattr(topologies, "has_compiler", lambda: True)
    monkeypatch.setattr(jax_topologies, "get_topology_desc", refuse)
    with pytest.raises(ConfigError) as caught:
        topologies.compile_only_devices(find_topology(name))
    assert hint in caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(("name", "options"), [
    ("v4:2x2x1", {"chip_config_name": "megacore"}), ("v5p-8", {"chip_config_name": "megacore"}),
    ("v3:2x2", {}), ("v6e:1x1", {"chips_per_host_bounds": (1, 1, 1)})])
def test_libtpu_is_asked_for_the_devices_that_jax_shows_on_such_a_slice(name, options, monkeypatch):
    from jax.experimental import topologies as jax_topologies

    asked = []
    monkeypatch.setattr(topologies, "has_compiler", lambda: True)
    monkeypatch.setattr(jax_topologies, "get_topology_desc",
                        lambda **all: asked.append(all) or types.SimpleNamespace(devices=()))
    found = find_topology(name)
    assert topologies.compile_only_devices(found) == []
    assert asked == [{"platform": "tpu", "topology_name": found.name, **options}]


# ---------------------------------------------------------------- a compiled plan, by hand

def compiled_plan(**changes) -> planning.Plan:
    """A plan whose compiler's figures are made up: 12 GiB in all, 1.4 GiB sent, one odd loop."""
    sent = {**dict.fromkeys(COLLECTIVES, 0), "all-reduce": GIB, "all-gather": 4 * GIB // 10}
    count = {**dict.fromkeys(COLLECTIVES, 0), "all-reduce": 3, "all-gather": 9}
    step = CompiledStep(61.4, MEMORY, 2e12, Traffic(sent, count, 90 * GIB, ("while.7",)))
    topology = find_topology("v3:2x2")
    bound = roofline(6e12, 90 * GIB, 1.4 * GIB, peak_flops=61.5e12, memory_bandwidth=450e9,
                     link_bandwidth=topology.links * topology.chip.link_bandwidth)
    values = {"config": tiny_run.config(), "topology": topology,
              "mesh": {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}, "parameters": 1_234_567,
              "tokens": 65_536, "flops": 48e12, "state_bytes": 4 * GIB, "step": step,
              "bound": bound, "batch_limit": 24, "versions": {"jax": "1.2.3"}}
    return planning.Plan(**{**values, **changes})


def test_the_text_of_a_plan_has_every_figure():
    text = " ".join(describe(compiled_plan()).split())
    for part in ("8 x TPU v3, mesh data 4 * fsdp 2", "1,234,567", "12.00 GiB of 16.00 GiB: fits "
                 "(75%)", "6.00 GiB (activations", "3.00 GiB, of which 2.00 GiB reuse",
                 "about 24 sequences", "61 s", "4.8e+13 in all, 6e+12 per device",
                 "XLA counts 2e+12 per device: loops once", "90.00 GiB per device and step",
                 "1.40 GiB sent", "all-reduce 1.00 GiB in 3",
                 "all-gather 0.40 GiB in 9", "1 loops of unknown length count once: "
                 "while.7", "compute 97.6 ms, memory 214.7 ms, links 10.7 ms",
                 "takes 214.7 ms or more (memory), so at most 305,176 tokens/s at 45% MFU",
                 "jax 1.2.3"):
        assert part in text, part


def test_a_step_larger_than_the_memory_does_not_fit():
    plan = compiled_plan()
    big = dataclasses.replace(plan.step, memory=dataclasses.replace(MEMORY, temporaries=11 * GIB))
    plan = compiled_plan(step=big)
    assert plan.fits is False and "does NOT fit" in describe(plan)
    assert compiled_plan().fits is True
    assert plan.to_json()["compiled"]["memory"]["total"] == 17 * GIB


def test_a_batch_far_beyond_what_was_compiled_is_not_promised():
    assert "more than 8 times the 8 sequences" in describe(compiled_plan(batch_limit=72))
    assert "about 64 sequences" in describe(compiled_plan(batch_limit=64))


def test_a_state_larger_than_a_gpu_does_not_fit():
    gpu = compiled_plan(step=None, topology=find_topology("t4x1"), state_bytes=20 * GIB)
    assert gpu.fits is False and math.isclose(gpu.bound.seconds, compiled_plan().bound.seconds)
