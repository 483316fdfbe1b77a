"""Memory that XLA frees stays with the process, and is not cleared anew for every step."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, threading
if sys.argv[1] == "keep":
    from hippocampus.allocator import keep_freed_memory
    assert keep_freed_memory()
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def step():  # as a step of XLA: one block for all that it computes
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)

def run():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


def python(code, *arguments, **environment):
    here = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, text=True,
                          env=here | {"JAX_PLATFORMS": "cpu"} | environment,
                          stdout=subprocess.PIPE)
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_memory_is_used_again_without_page_faults():
    assert int(python(FAULTS, "keep")) < 100 < int(python(FAULTS, "default"))


@pytest.mark.parametrize("environment", [
    {"JAX_PLATFORMS": "cuda"}, {"MALLOC_ARENA_MAX": "4"}], ids=["accelerator", "turned off"])
def test_it_stays_out_of_the_way(environment):
    code = "from hippocampus.allocator import keep_freed_memory; print(keep_freed_memory())"
    assert python(code, **environment) == "False"


def test_the_train_verb_can_call_it_before_jax_is_imported():
    assert python("import sys, hippocampus.train; print('jax' in sys.modules)") == "False"
