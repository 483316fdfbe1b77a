"""Two real processes save and restore: damage and a full disk are decided alike."""

import socket
import subprocess
import sys

import tiny_run

SCRIPT = """
import resource, signal, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from hippocampus import distributed
from hippocampus.config import CheckpointConfig
from hippocampus.errors import HippocampusError
from hippocampus.runs import step_folders
from hippocampus.runs.checkpoints import Checkpoints, abstract

folder, port, me = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.initialize(f"127.0.0.1:{port}", 2, me)
rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
x = jax.device_put(jax.random.normal(jax.random.key(0), (2, 50_000)), rows)

def flip(step):
    distributed.barrier()
    if me == 0:
        file = sorted((folder / str(step) / "params" / "d").iterdir())[0]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    distributed.barrier()

def say(line):
    print(line, flush=True)

try:
    with Checkpoints(folder, CheckpointConfig(keep_latest=9), say) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, {"params": {"x": x + step}}, float(step))
        checkpoints.wait()
        flip(3)
        step, back = checkpoints.restore_newest({"params": {"x": abstract(x)}})
        assert bool(jnp.array_equal(back["params"]["x"], x + step))
        say(f"{step} of {checkpoints.steps}")
        checkpoints.set_aside(1, "rolled_back")
        say(checkpoints.steps)
        enough = step_folders.lack_of_space
        if me == 0:  # the one that is asked
            step_folders.lack_of_space = lambda folder, size: "the disk is full"
        say(checkpoints.save(4, {"params": {"x": x}}, None))
        step_folders.lack_of_space = enough
        say(checkpoints.save(4, {"params": {"x": x}}, None))
        checkpoints.wait()
        say(checkpoints.steps)
        if me == 1:  # the disk of one fills up in the middle of a save
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        checkpoints.save(5, {"params": {"x": x}}, None)
        checkpoints.wait()
    say("not reached")
except HippocampusError as error:
    if distributed.report_failure(error.exit_code):
        say(f"error: {error.message}")
    distributed.leave_failed(error.exit_code)
"""


def test_two_processes_decide_alike_and_end_together(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**tiny_run.environment(), "JAX_NUM_CPU_DEVICES": "1"}
    running = [subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "steps"), port, str(me)], env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE) for me in (0, 1)]
    try:
        out = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    said = [[line for line in text.splitlines() if "Gloo" not in line] for text, _ in out]
    assert [process.returncode for process in running] == [1, 1], out
    assert said[1].pop() == "error: step 5 could not be saved: File too large"
    assert said[0] == said[1]
    assert said[0][0].startswith("checkpoint 3 is damaged (params/d/")
    assert said[0][1:] == ["2 of [1, 2]", "[1]", "warning: step 4 was not saved: the disk is full",
                           "False", "True", "[1, 4]"]
    assert {"1", "2.rolled_back", "3.damaged", "4"} <= {
        path.name for path in (tmp_path / "steps").iterdir()}
