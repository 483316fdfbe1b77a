"""What makes XLA's compiler for the CPU quick: most of a test's time goes into compilers.

Programs of tests run for milliseconds, so they need no LLVM optimisations; and the fusion emitters,
which go through MLIR, take two fifths of a compilation. `--full` compiles as users do.
"""

from importlib import metadata

FLAGS = ("--xla_backend_optimization_level=0",)
USUAL_EMITTERS: dict[str, bool] = {}
"""Compiler options of a program whose bits depend on what is fused: the emitters of users."""

# A flag that XLA does not know ends the process, and newer ones have no other emitters.
if metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ("--xla_cpu_use_fusion_emitters=false",)
    USUAL_EMITTERS = {"xla_cpu_use_fusion_emitters": True}
