"""The TPU kernels compiled for slices that are not here, under their mesh (needs libtpu)."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny_run

OTHER_PYTHON = os.environ.get("HIPPOCAMPUS_TPU_PYTHON")
SLICES = ("v3:2x2", "v4:2x2x1", "v5e:2x2", "v6e:2x2")
ARRAY = 8 * 512 * 256 * 4
"""Bytes of a float32 array of a device; those in bfloat16 have half the rows as well."""

pytestmark = pytest.mark.skipif(
    not OTHER_PYTHON and importlib.util.find_spec("libtpu") is None,
    reason="no libtpu here (./test --full makes an environment that has it)")


@functools.cache
def compiled() -> dict[str, dict]:
    """Slice -> program -> kernels in it and bytes, or the compiler's refusal."""
    env = {name: value for name, value in tiny_run.environment().items()
           if not name.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [OTHER_PYTHON or sys.executable, "tests/tpu/kernels.py", *SLICES], capture_output=True,
        text=True, env=env, timeout=300, cwd=tiny_run.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("program", "arrays"), [
    ("scan float32", 3), ("scan_backward float32", 5), ("gated_scan float32", 4),
    ("gated_scan_backward float32", 8), ("scan bfloat16", 3 / 4), ("scan_backward bfloat16", 5 / 4),
    # In bfloat16 the states and their gradient, of the gated one, are still float32.
    ("gated_scan bfloat16", 4 / 4), ("gated_scan_backward bfloat16", 6 / 4 + 2 / 2)])
@pytest.mark.parametrize("topology", SLICES)
def test_a_scan_is_one_kernel_that_moves_every_array_once(topology, program, arrays):
    found = compiled()[topology][program]
    assert "error" not in found, found
    assert (found["kernels"], found["sent"]) == (1, 0)
    assert found["memory"] >= arrays * ARRAY
    if topology in ("v4:2x2x1", "v5e:2x2"):  # elsewhere some transposes stay where no one fuses
        assert found["memory"] < 1.05 * arrays * ARRAY


@pytest.mark.parametrize("topology", SLICES[1:])
def test_fused_attention_moves_a_small_part_of_what_xla_does(topology):
    flash, xla = compiled()[topology]["flash"], compiled()[topology]["xla"]
    assert (flash["kernels"], flash["sent"], xla["kernels"]) == (3, 0, 0)
    assert flash["memory"] < 0.1 * xla["memory"]


def test_fused_attention_in_bfloat16_does_not_compile_for_a_v3():
    assert "Unsupported matmul RHS type" in compiled()["v3:2x2"]["flash"]["error"]
