"""Training steps compiled for TPUs on a machine that has none (needs libtpu).

`./test --full` makes an environment with libtpu and names its interpreter in
HIPPOCAMPUS_TPU_PYTHON; otherwise these tests run where libtpu can be imported.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny_run

OTHER_PYTHON = os.environ.get("HIPPOCAMPUS_TPU_PYTHON")
GIB = 2**30

pytestmark = pytest.mark.skipif(
    not OTHER_PYTHON and importlib.util.find_spec("libtpu") is None,
    reason="no libtpu here (./test --full makes an environment that has it)")

TWO_LAYERS = {
    "data.context": 128, "train.batch_size": 8, "model.d_model": 128, "model.n_layers": 2,
    "model.n_heads": 1, "model.scan_layers": True, "model.remat": "full",
    "model.hopfield.depth_schedule": "1", "model.segments.train": 1, "model.segments.weights": "1"}


def plan(config: str, topology: str, timeout: float = 300,
         **changes) -> subprocess.CompletedProcess:
    """Runs the verb."""
    env = {name: value for name, value in tiny_run.environment().items()
           if not name.startswith(("JAX_", "XLA_"))}
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in changes.items()]
    return subprocess.run(
        [OTHER_PYTHON or sys.executable, "-m", "hippocampus.plan", f"--config={config}",
         f"--topology={topology}",
         "--json", *overrides], capture_output=True, text=True, env=env, timeout=timeout,
        cwd=tiny_run.ROOT)


def planned(*arguments, **changes) -> dict:
    done = plan(*arguments, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@functools.cache
def two_layers(topology: str = "v5e:2x2", **changes) -> dict:
    config = tiny_run.folder() / "two.py"
    config.write_text("from hippocampus.config_files import defaults\n\n\ndef get_config():\n"
                      "    return defaults()\n")
    return planned(str(config), topology, **{**TWO_LAYERS, **changes})


@functools.cache
def programs() -> dict[str, dict]:
    """What generation and the probes of a small model need on a chip."""
    env = {name: value for name, value in tiny_run.environment().items()
           if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [OTHER_PYTHON or sys.executable, "tests/tpu/programs.py", "configs/quickstart.py",
         "v5e:2x2", "4", json.dumps({"model.hopfield.patterns": "both"})],
        capture_output=True, text=True, env=env, timeout=300, cwd=tiny_run.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_generation_compiles_for_a_tpu_and_updates_its_caches_in_place():
    for program in (programs()["write"], programs()["read"]):
        assert 2**20 < program["aliased"] < program["arguments"]
        assert program["temporary"] < 64 * 2**20


def test_every_intervention_at_once_compiles_for_a_tpu():
    assert programs()["probe"]["arguments"] > 2**20
    assert programs()["probe"]["temporary"] < 64 * 2**20


def test_two_layers_compile_for_a_tpu_that_is_not_there():
    found = two_layers()
    assert (found["device"], found["devices"]) == ("TPU v5 lite", 4)
    assert found["fits"] is True and found["compute_dtype"] == "bfloat16"
    memory = found["compiled"]["memory"]
    # The state and three arrays of 2 sequences of 128; layouts are padded to whole tiles.
    assert memory["arguments"] == pytest.approx(found["state_bytes"] + 3 * 4 * 2 * 128, rel=0.05)
    assert memory["aliased"] == pytest.approx(memory["arguments"], rel=0.05)  # donated
    assert 0 < memory["temporaries"] < 0.1 * GIB
    assert found["compiled"]["traffic"]["unknown_loops"] == []


def test_gradients_are_reduced_once_over_the_data_axis():
    found = two_layers()
    sent = found["compiled"]["traffic"]["sent"]
    # A ring of 4 sends 2 * 3/4 of what is reduced: a gradient per parameter, of 2 or 4 bytes.
    reduced = sent["all-reduce"] / 1.5 / found["parameters"]
    assert 1.9 < reduced < 4.3
    assert sent["all-gather"] + sent["reduce-scatter"] < 0.01 * sent["all-reduce"]


@pytest.mark.full
def test_sharded_parameters_are_gathered_and_need_less_memory():
    found, whole = two_layers(mesh__fsdp=4), two_layers()
    assert found["state_bytes"] < 0.3 * whole["state_bytes"]
    assert found["compiled"]["traffic"]["sent"]["all-gather"] > 0


@pytest.mark.full
def test_what_the_compiler_cannot_make_fit_is_one_line():
    config = tiny_run.folder() / "two.py"
    two_layers()
    done = plan(str(config), "v5e:2x2", **{**TWO_LAYERS, "model.vocab_size": 12_000_000,
                                           "model.n_layers": 1})
    assert done.returncode == 64, done.stderr[-3000:]
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: two does not fit: ") and "usable 15." in error
    assert hint.startswith("hint: try ")


# The config as it is takes 14 minutes and more to compile for a v5e. docs/planning.md has the
# figures of these settings and of others.
SCANNED = {"model.scan_layers": "true", "model.remat": "full"}
FULL_SIZE = {"v3:2x2": {}, "v4:2x2x1": SCANNED, "v5e:4x4": SCANNED}


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", FULL_SIZE)
def test_the_main_model_fits(topology):
    found = planned("configs/wt103_bpe.py", topology, timeout=3500, **FULL_SIZE[topology])
    assert found["parameters"] == pytest.approx(97e6, rel=0.02)
    assert found["tokens_per_step"] == 65_536
    assert found["fits"] is True
    assert found["compiled"]["memory"]["total"] < found["memory_bytes_of_device"]
    assert found["compiled"]["traffic"]["unknown_loops"] == []
    # Gradients are reduced at least once, in 2 or 4 bytes each.
    assert found["compiled"]["traffic"]["sent"]["all-reduce"] > 1.5 * 2 * found["parameters"]


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("shape", "parameters", "n_layers"), [
    ("e2b", 4.50e9, 30), ("e4b", 6.90e9, 35)])
def test_adapters_in_a_frozen_gemma3n_fit(shape, parameters, n_layers):
    found = planned(f"configs/buu_gemma3n_e2b.py:{shape}", "v5e:2x4", timeout=3500,
                    **{"model.scan_layers": True})
    assert found["parameters"] == pytest.approx(parameters, rel=0.01)
    # The decoder in bfloat16 and the adapters' weights and moments, shared out over eight.
    assert found["state_bytes"] < 1.1 * (2 * parameters + 3 * 4 * 65.6e6) / 8
    assert found["fits"] is True
    # Weights cross the links a few times a step, not ten times.
    assert sum(found["compiled"]["traffic"]["sent"].values()) < 2 * 2 * parameters
    # Nowhere is the table of the layers' own inputs whole.
    assert found["compiled"]["memory"]["temporaries"] < 2 * 262_144 * n_layers * 256


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_memory_behind_a_frozen_llama_of_3b_fits_four_chips():
    found = planned("configs/chopt_llama32_3b.py", "v4:2x2x1", timeout=3500)
    assert found["parameters"] == pytest.approx(3.23e9, rel=0.01)
    # The decoder in bfloat16, and what is trained with its moments, shared out over four.
    assert found["state_bytes"] < 1.2 * 2 * found["parameters"] / 4
    assert found["fits"] is True
