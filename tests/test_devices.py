"""The table that says what suits each kind of device, and what "auto" becomes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hippocampus import devices
from hippocampus.config_files import defaults, load_config
from hippocampus.devices import (
    Choice,
    Device,
    check_deterministic,
    choose,
    prepare_deterministic,
    resolve,
    this_device,
)
from hippocampus.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
CPU = Device("cpu", "cpu")
T4 = Device("gpu", "Tesla T4", 7.5)
A100 = Device("gpu", "NVIDIA A100-SXM4-40GB", 8.0)
H100 = Device("gpu", "NVIDIA H100 80GB HBM3", 9.0)
V5E = Device("tpu", "TPU v5 lite")


@pytest.mark.parametrize(("device", "dtype", "attention"), [
    (CPU, "float32", "xla"),
    (T4, "float32", "xla"),
    (Device("gpu", "Tesla V100-SXM2-16GB", 7.0), "float32", "xla"),
    (Device("gpu", "NVIDIA GeForce RTX 3090", 8.6), "bfloat16", "cudnn"),
    (A100, "bfloat16", "cudnn"), (H100, "bfloat16", "cudnn"),
    (Device("gpu", "NVIDIA L4", 8.9), "bfloat16", "cudnn"),
    (Device("gpu", "NVIDIA B200", 10.0), "bfloat16", "cudnn"),
    (Device("tpu", "TPU v2"), "bfloat16", "xla"), (Device("tpu", "TPU v3"), "bfloat16", "xla"),
    (Device("tpu", "TPU v4"), "bfloat16", "flash"), (V5E, "bfloat16", "flash"),
    (Device("tpu", "TPU v5p"), "bfloat16", "flash"),
    (Device("tpu", "TPU v6e"), "bfloat16", "flash"),
    (Device("tpu", "TPU v9 of the future"), "bfloat16", "flash"),
])
def test_dtype_and_attention_of_a_device(device, dtype, attention):
    choice = choose(device)
    assert (choice.compute_dtype, choice.attention) == (dtype, attention)
    assert choice.scan in ("sequential", "associative", "chunked", "pallas")


@pytest.mark.parametrize(("device", "tera_flops"), [
    (Device("tpu", "TPU v2"), 22.5), (Device("tpu", "TPU v3"), 61.5),
    (Device("tpu", "TPU v4"), 275), (Device("tpu", "TPU v5 lite"), 197),
    (Device("tpu", "TPU v5e"), 197),
    (Device("tpu", "TPU v5p"), 459), (Device("tpu", "TPU v5"), 459),
    (Device("tpu", "TPU v6 lite"), 918), (Device("tpu", "TPU v6e"), 918),
    (T4, 8.1), (A100, 312), (H100, 989), (Device("gpu", "NVIDIA H200", 9.0), 989),
    (Device("gpu", "NVIDIA L4", 8.9), 121),
    (Device("gpu", "NVIDIA L40S", 8.9), 0), (Device("tpu", "TPU v9 of the future"), 0), (CPU, 0),
])
def test_peak_of_a_device(device, tera_flops):
    assert choose(device).peak_flops == pytest.approx(tera_flops * 1e12)


@pytest.mark.parametrize("device", [Device("metal", "Apple M3"), Device(""),
                                    Device("npu", "H100")])
def test_unknown_platform_gets_what_is_portable(device):
    assert choose(device) == choose(CPU) == Choice("float32", "xla", "chunked")


def test_this_device_is_in_the_table_as_jax_names_it():
    import jax

    device = this_device()
    assert device.platform in ("cpu", "gpu", "tpu")
    assert device.kind == jax.devices()[0].device_kind


def test_automatic_fields_are_decided_and_reported():
    config, decided = resolve(load_config(defaults()), H100)
    assert set(decided) == {"model.compute_dtype", "model.attention.backend", "model.ssm.backend",
                            "loss.backend"}
    assert config.model.compute_dtype == "bfloat16"
    assert config.model.attention.backend == "cudnn"
    assert config.model.ssm.backend == "pallas"
    assert config.loss.backend == "full"


def test_nothing_is_automatic_after_resolving():
    config, _ = resolve(load_config(defaults()), CPU)
    assert resolve(config, CPU) == (config, ())
    assert "auto" not in str(dataclasses.asdict(config))


def test_explicit_values_are_left_alone():
    asked = load_config(defaults(), {
        "model.compute_dtype": "float16", "model.attention.backend": "xla",
        "model.ssm.backend": "sequential", "loss.backend": "chunked"})
    config, decided = resolve(asked, H100)
    assert decided == ()
    assert dataclasses.replace(config.model, max_length=0) == asked.model
    assert config.loss == asked.loss


def test_what_was_automatic_elsewhere_is_decided_anew():
    there, decided = resolve(load_config(defaults(), {"model.ssm.backend": "sequential"}), H100)
    here, again = resolve(there, CPU, automatic=decided)
    assert here.model.compute_dtype == "float32" and here.model.attention.backend == "xla"
    assert here.model.ssm.backend == "sequential" and set(again) == set(decided)


@pytest.mark.parametrize("device", [CPU, T4, V5E, Device("metal", "Apple M3")])
def test_cudnn_is_refused_where_there_is_none(device):
    asked = load_config(defaults(), {"model.attention.backend": "cudnn"})
    with pytest.raises(ConfigError, match=r"^model\.attention\.backend is cudnn on "):
        resolve(asked, device)


@pytest.mark.parametrize("device", [CPU, H100, Device("tpu", "TPU v3")])
def test_flash_attention_is_refused_where_there_is_none(device):
    asked = load_config(defaults(), {"model.attention.backend": "flash"})
    with pytest.raises(ConfigError, match=r"^model\.attention\.backend is flash on "):
        resolve(asked, device)
    assert resolve(asked, V5E)[0].model.attention.backend == "flash"


def test_cudnn_is_taken_where_there_is_one():
    asked = load_config(defaults(), {"model.attention.backend": "cudnn"})
    assert resolve(asked, A100)[0].model.attention.backend == "cudnn"


@pytest.mark.parametrize(("kind", "attention", "scan"), [
    ("TPU v2", "xla", "chunked"), ("TPU v3", "xla", "pallas"), ("TPU v4", "flash", "pallas"),
    ("TPU v5 lite", "flash", "pallas"), ("TPU v6 lite", "flash", "pallas"),
    ("TPU v9", "flash", "chunked")])
def test_a_tpu_gets_the_kernels_that_compile_for_it(kind, attention, scan):
    choice = choose(Device("tpu", kind))
    assert (choice.attention, choice.scan) == (attention, scan)


@pytest.mark.parametrize(("kind", "backends"), [
    ("s6", ("chunked", "pallas", "chunked")), ("ssd", ("chunked",) * 3),
    ("diagonal", ("chunked", "pallas", "pallas"))])
def test_the_scan_of_a_kind_is_one_that_the_device_has_for_it(kind, backends):
    config = load_config(defaults(), {"model.ssm.kind": kind})
    found = tuple(resolve(config, device)[0].model.ssm.backend for device in (CPU, H100, V5E))
    assert found == backends


@pytest.mark.parametrize(("vocab_size", "device", "backend"), [
    (256, CPU, "full"), (8192, CPU, "full"), (8193, CPU, "chunked"), (32_000, CPU, "chunked"),
    (8192, H100, "full"), (8193, H100, "fused"), (32_000, A100, "chunked"),
    (32_000, Device("gpu", "NVIDIA B200", 10.0), "chunked"), (32_000, V5E, "chunked")])
def test_loss_of_a_large_vocabulary_is_chunked_and_on_hopper_fused(vocab_size, device, backend):
    config = load_config(defaults(), {"model.vocab_size": vocab_size})
    assert resolve(config, device)[0].loss.backend == backend


@pytest.mark.parametrize("device", [CPU, A100, V5E, Device("gpu", "NVIDIA B200", 10.0)])
def test_a_fused_loss_is_refused_where_its_kernel_does_not_run(device):
    asked = load_config(defaults(), {"loss.backend": "fused"})
    with pytest.raises(ConfigError, match=r"^loss\.backend is fused on "):
        resolve(asked, device)
    assert resolve(asked, H100)[0].loss.backend == "fused"


def test_position_table_gets_a_row_per_token_of_the_context():
    config = load_config(defaults(), {"data.context": 96})
    assert resolve(config, CPU)[0].model.max_length == 96
    longer = load_config(defaults(), {"data.context": 96, "model.max_length": 200})
    assert resolve(longer, CPU)[0].model.max_length == 200


def test_deterministic_gpu_runs_take_no_attention_that_adds_in_any_order():
    config = load_config(defaults(), {"train.deterministic": True})
    assert resolve(config, H100)[0].model.attention.backend == "xla"
    assert resolve(load_config(defaults()), H100)[0].model.attention.backend == "cudnn"
    with pytest.raises(ConfigError, match=r"cudnn with train\.deterministic"):
        resolve(load_config(defaults(), {"train.deterministic": True,
                                         "model.attention.backend": "cudnn"}), H100)


def test_deterministic_gpu_runs_need_the_flag_before_jax_starts(monkeypatch):
    config = load_config(defaults(), {"train.deterministic": True})
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_disable_metadata=true")
    check_deterministic(config)  # a CPU is deterministic
    monkeypatch.setattr(devices, "this_device", lambda: H100)
    check_deterministic(load_config(defaults()))
    with pytest.raises(ConfigError, match="needs XLA_FLAGS="):
        check_deterministic(config)
    for _ in range(2):
        prepare_deterministic()
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_dump_disable_metadata=true", "--xla_gpu_deterministic_ops=true"]
    check_deterministic(config)


TRACE = """import sys
import jax
import numpy as np
from hippocampus.config_files import load_config
from hippocampus.data.batches import Batch
from hippocampus.devices import Device, portable, resolve
from hippocampus.models.build_model import FAMILIES
from hippocampus.training.optimizer import build_optimizer
from hippocampus.training.state import init_state
from hippocampus.training.step import train_step

config, _ = resolve(load_config(sys.argv[1], {
    "model.n_layers": "1", "model.d_model": "128", "model.n_heads": "2", "model.vocab_size": "64",
    "data.context": "256", "train.batch_size": "2"}), Device(*eval(sys.argv[2])))
assert config.model.ssm.backend == "pallas"
config = portable(config)
before = set(sys.modules)
model, optimizer = FAMILIES["hybrid"](config), build_optimizer(config.optimizer, 2)
ids = np.zeros((2, 256), np.int32)
batch = Batch(ids, ids, np.ones((2, 256), np.float32))
state = jax.eval_shape(lambda: init_state(model, optimizer, config))
jax.eval_shape(train_step(model, optimizer, config), state, batch)
print(*sorted(name for name in set(sys.modules) - before if "pallas" in name), sep="\\n")
"""


@pytest.mark.parametrize("device", [H100, V5E], ids=lambda device: device.platform)
def test_no_kernel_language_is_imported_while_a_step_is_traced(device):
    # An import brings JAX new settings: the step's second call would be compiled once more.
    done = subprocess.run(
        [sys.executable, "-c", TRACE, str(ROOT / "configs/quickstart.py"),
         repr(dataclasses.astuple(device))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split()
