"""What is asked of XLA beyond its defaults: every flag in one place, each with its reason.

What a whole process needs goes into `XLA_FLAGS` before JAX sees a device (`prepare`); what one
program needs goes with it to the compiler (`compiler_options`). Flags that made no difference
here are not set: see docs/performance.md.
"""

from __future__ import annotations

import os

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
"""No atomic additions, and no kernel chosen by timing: the same bits every time, but slower."""

NAMED_KERNELS = "--xla_gpu_enable_command_buffer="
"""No command buffers (CUDA graphs): kernels that are launched in one go have no names in a trace.
Launching them one by one takes the host longer, which may show as idle time between kernels."""

TRACEBACKS = "JAX_TRACEBACK_IN_LOCATIONS_LIMIT"
"""JAX's variable for how many calls of Python stand beside each instruction of a program."""

Option = str | bool | int


def prepare(*flags: str) -> None:
    """Adds flags to `XLA_FLAGS`; must come before JAX sees a device. Those that are there stay."""
    present = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in present}
    missing = [flag for flag in flags if flag.partition("=")[0] not in names]
    if missing:
        os.environ["XLA_FLAGS"] = " ".join([*present, *missing])


def asked(flag: str) -> bool:
    """Whether `XLA_FLAGS` has it."""
    return flag in os.environ.get("XLA_FLAGS", "").split()


def python_calls(most: int) -> None:
    """How many calls of Python a program keeps beside each instruction; names of layers stay.

    XLA puts them into words when it loads a program for a GPU: 1 to 4 s of a start for the main
    model's step, whose instructions are 54,000. The verbs keep none, but for those that profile,
    where tools show lines of code. The variable `TRACEBACKS` says otherwise.

    Args:
      most: JAX's own default is 100.
    """
    import jax

    if TRACEBACKS not in os.environ:
        jax.config.update(TRACEBACKS.lower(), most)


def compiler_options(platform: str, n_devices: int) -> dict[str, Option]:
    """Options of a training step's compilation.

    Args:
      platform: as JAX names it ("gpu", "tpu", "cpu").
      n_devices: in the mesh.
    """
    options: dict[str, Option] = {}
    if platform == "gpu" and n_devices > 1:
        # Reduces the gradients of one layer while those of the next are computed. On one GPU
        # there is nothing to hide, and other orders of the same work cost memory.
        options["xla_gpu_enable_latency_hiding_scheduler"] = True
    return options
