"""GKE through xpk, SkyPilot, the image they run, and what one node of theirs does."""

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from fake_tools import ROOT, Launchers, read_words

TRAIN = ("train", "--config=x.py", "--say=two words")
GKE = ("gke_xpk.sh", "run", "--cluster=c", "--project=p", "--zone=z", "--name=n", "--image=i:1")
COMMON = ["--docker-image=i:1", "--priority=medium", "--max-restarts=20",
          "--restart-on-exit-codes=1,69,75", "--termination-grace-period-seconds=120"]
RETRYABLE = {69, 75}


@pytest.fixture
def launchers(tmp_path):
    return Launchers(tmp_path)


# --- GKE -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    (["--tpu=v5litepod-16", "--slices=2"],
     ["--tpu-type=v5litepod-16", "--num-slices=2", *COMMON, "--env=HIPPOCAMPUS_EXPECT_DEVICES=32"]),
    (["--gpu=h100-80gb-8", "--nodes=2", "--env=A=b c", "--xpk_flag=--spot"],
     ["--device-type=h100-80gb-8", "--num-nodes=2", *COMMON, "--env=A=b c", "--spot"]),
], ids=["tpu", "gpu"])
def test_a_workload(launchers, options, words):
    assert launchers.run(*GKE, *options, *TRAIN).returncode == 0
    command = "exec bash launch/_node.sh train --config=x.py '--say=two words'"
    assert launchers.calls() == [["xpk", "workload", "create", "--workload=n", *words,
                                  f"--command={command}", "--cluster=c", "--project=p",
                                  "--zone=z"]]


@pytest.mark.parametrize("word", ['say "no"', "$HOME", "back\\slash", "it's", "new\nline", "{x}"])
def test_words_that_yaml_or_kubernetes_would_change_travel_encoded(launchers, word):
    launchers.run(*GKE, "--tpu=v6e-8", "train", word)
    command = next(w for w in launchers.calls()[0] if w.startswith("--command="))
    (encoded,) = re.findall(r"--encoded=([A-Za-z0-9+/=]+)$", command)
    assert read_words(base64.b64decode(encoded).decode()) == ["train", word]


@pytest.mark.parametrize(("options", "error"), [
    ([], "give one of --tpu=TYPE and --gpu=TYPE"),
    (["--tpu=v6e-8", "--gpu=h100-80gb-8"], "give one of --tpu=TYPE and --gpu=TYPE"),
    (["--tpu=v6e-8", "--accel=cuda"], "--accel is 'cuda'"),
    (["--tpu=v6e-8", "--image="], "--image is missing"),
    (["--tpu=v6e-8", "--name="], "--name is missing"),
    (["--tpu=v6e-8", "--cluster="], "--cluster is missing")])
def test_what_a_workload_lacks_is_said(launchers, options, error):
    done = launchers.run(*GKE, *options, "train")
    assert done.returncode == 64
    assert error in done.stderr.splitlines()[0]
    assert launchers.calls() == []


def test_the_image_is_built_and_pushed(launchers):
    done = launchers.run("gke_xpk.sh", "build", "--image=i:1", "--accel=cuda13")
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [
        ["docker", "build", "--build-arg=ACCEL=cuda13", "--file=launch/Dockerfile", "--tag=i:1",
         "."],
        ["docker", "push", "i:1"]]


def test_an_image_that_was_not_built_is_not_pushed(launchers):
    launchers.answer("docker", "2 no space")
    assert launchers.run("gke_xpk.sh", "build", "--image=i:1").returncode == 2
    assert len(launchers.calls()) == 1


def test_list_and_delete(launchers):
    launchers.run("gke_xpk.sh", "list", "--cluster=c")
    launchers.run("gke_xpk.sh", "delete", "--cluster=c", "--name=n")
    assert launchers.calls() == [
        ["xpk", "workload", "list", "--cluster=c"],
        ["xpk", "workload", "delete", "--workload=n", "--force", "--cluster=c"]]


def test_delete_without_a_name_would_delete_all_and_is_refused(launchers):
    done = launchers.run("gke_xpk.sh", "delete", "--cluster=c")
    assert done.returncode == 64 and "--name is missing" in done.stderr
    assert launchers.calls() == []


def test_the_image_copies_what_is_there():
    text = (ROOT / "launch/Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
               for word in line.split()[:-1]]
    assert {"pyproject.toml", "hippocampus", "configs", "launch"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)
    python = re.search(r"^FROM python:3\.(\d+)-slim$", text, re.MULTILINE)
    assert python and int(python[1]) >= 11
    assert "HIPPOCAMPUS_READY_PYTHON=python" in text  # nothing is set up in a container


# --- SkyPilot ------------------------------------------------------------------------------------


def job(text=None):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load(text or (ROOT / "launch/skypilot.yaml").read_text())


def test_the_job_is_a_task_that_skypilot_knows():
    task = job()
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    assert task["workdir"] == "."
    assert all(isinstance(value, str) for value in task["envs"].values())


def test_the_job_recovers_from_what_can_be_tried_again_and_nothing_else():
    recovery = job()["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == RETRYABLE
    assert recovery["max_restarts_on_errors"] == 0  # or 64 would be tried again


@pytest.mark.parametrize("part", ["setup", "run"])
def test_the_parts_of_the_job_are_shell(part):
    subprocess.run(["bash", "-n", "-c", job()[part]], check=True)


def test_the_job_runs_the_verb_with_its_flags(launchers):
    (launchers.root / ".python-path").write_text("/opt/python\n")
    launchers.tools("python")
    words = "train --config=x.py two\\ words ''"
    done = subprocess.run(["bash", "-c", job()["run"]], cwd=launchers.root,
                          env=launchers.env | {"HIPPOCAMPUS_ARGUMENTS": words},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [["python", "-m", "hippocampus.train", "--config=x.py",
                                  "two words", ""]]


def test_launching_the_job(launchers):
    done = launchers.run("skypilot.sh", "--gpus=A100:4", "--nodes=2", "--spot", "--name=mine",
                         "--env=A=b c", "--sky_flag=--region=r", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [[
        "sky", "jobs", "launch", "--yes", "--name=mine", "--gpus=A100:4", "--num-nodes=2",
        "--use-spot", "--env=HIPPOCAMPUS_ACCEL=cuda12",
        "--env=HIPPOCAMPUS_ARGUMENTS=train --config=x.py --say=two\\ words", "--env=A=b c",
        "--region=r", "launch/skypilot.yaml"]]


@pytest.mark.parametrize(("nodes", "mode"), [(1, "MOUNT_CACHED"), (2, "MOUNT")])
def test_a_bucket_is_mounted_where_runs_go(launchers, nodes, mode):
    kept = launchers.base / "kept.yaml"
    launchers.program("sky", f'#!/usr/bin/env bash\ncp "${{@: -1}}" "{kept}"\n')
    done = launchers.run("skypilot.sh", "--bucket=gs://mine/runs", f"--nodes={nodes}", *TRAIN)
    assert done.returncode == 0, done.stderr
    task = job(kept.read_text())
    assert task.pop("file_mounts") == {"/runs": {"source": "gs://mine/runs", "mode": mode}}
    assert task == job()
    assert not list(launchers.base.glob("hippocampus.*"))


def test_without_a_bucket_the_loss_is_said(launchers):
    assert "takes the run folder with it" in launchers.run("skypilot.sh", *TRAIN).stderr


def test_a_tpu_job_expects_its_chips(launchers):
    launchers.run("skypilot.sh", "--gpus=tpu-v5litepod-8", "--accel=tpu", *TRAIN)
    assert "--env=HIPPOCAMPUS_EXPECT_DEVICES=8" in launchers.calls()[0]


@pytest.mark.parametrize("options", [["--gpus=tpu-v6e-8"], ["--accel=tpu"],
                                     ["--gpus=H100:8", "--accel=tpu"], ["--accel=rocm"]])
def test_devices_and_packages_that_do_not_belong_together_are_refused(launchers, options):
    done = launchers.run("skypilot.sh", *options, "train")
    assert done.returncode == 64
    assert launchers.calls() == []


# --- One node ------------------------------------------------------------------------------------

XPK = {"NNODES": "2", "NODE_RANK": "1", "JAX_COORDINATOR_ADDRESS": "n-0.n",
       "JAX_COORDINATOR_PORT": "6002", "GPUS_PER_NODE": "8"}
SKY = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "4",
       "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}


def peers(address, n=2, rank=1):
    return [f"--coordinator_address={address}", f"--num_processes={n}", f"--process_id={rank}"]


@pytest.mark.parametrize(("env", "flags"), [
    ({}, []),
    (XPK, [*peers("n-0.n:6002"), "--expect_devices=16"]),
    ({**XPK, "JAX_COORDINATOR_ADDRESS": "n-0.n:7"}, [*peers("n-0.n:7"), "--expect_devices=16"]),
    (SKY, [*peers("10.0.0.1:8476"), "--expect_devices=8"]),
    ({**SKY, "SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"}, ["--expect_devices=4"]),
    ({**SKY, "SKYPILOT_NUM_GPUS_PER_NODE": "0", "TPU_WORKER_ID": "1",
      "HIPPOCAMPUS_EXPECT_DEVICES": "16"}, ["--expect_devices=16"]),
], ids=["alone", "xpk", "xpk-with-port", "sky", "sky-one-node", "sky-tpu"])
def test_a_node_tells_the_program_where_its_peers_are(launchers, env, flags):
    launchers.tools("python")
    done = launchers.run("_node.sh", *TRAIN, **env)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [["python", "-m", "hippocampus.train", *TRAIN[1:], *flags]]


@pytest.mark.parametrize(("env", "runs"), [
    ({}, True), (XPK, False), ({**XPK, "NODE_RANK": "0"}, True), (SKY, False),
    ({"TPU_WORKER_ID": "3"}, False)])
def test_sample_runs_on_node_0_alone(launchers, env, runs):
    launchers.tools("python")
    done = launchers.run("_node.sh", "sample", "--workdir=w", **env)
    assert done.returncode == 0
    wanted = [["python", "-m", "hippocampus.sample", "--workdir=w"]]
    assert launchers.calls() == (wanted if runs else [])


def test_a_node_reads_back_what_was_encoded(launchers):
    launchers.tools("python")
    words = base64.b64encode(b"train 'it'\\''s' \\$HOME ''").decode()
    assert launchers.run("_node.sh", f"--encoded={words}").returncode == 0
    assert launchers.calls() == [["python", "-m", "hippocampus.train", "it's", "$HOME", ""]]


SAVING = """#!/usr/bin/env bash
trap 'echo TERM; saving=yes' TERM
echo up
for ((i = 0; i < 100; i++)); do
  sleep 0.05
  if [ -n "${saving:-}" ]; then sleep 0.5; exit "${FAKE_CODE:-75}"; fi
done
"""


@pytest.mark.parametrize("group", [False, True], ids=["the-node", "its-group"])
@pytest.mark.parametrize("code", [75, 0, 143])
def test_a_signal_reaches_the_program_once_and_its_code_comes_back(launchers, group, code):
    launchers.program("python", SAVING)
    command = ["bash", str(launchers.root / "launch/_node.sh"), "train"]
    node = subprocess.Popen(command, env=launchers.env | {"FAKE_CODE": str(code)},
                            stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert node.stdout and node.stdout.readline() == "up\n"
    os.kill(-node.pid if group else node.pid, signal.SIGTERM)
    out, _ = node.communicate(timeout=20)
    assert (out, node.returncode) == ("TERM\n", code)


def aborting(launchers, folder, *options, step=None, **env):
    """What a node whose program lost its peers ends with, and how long it waited."""
    launchers.program("python", "#!/usr/bin/env bash\nkill -ABRT $$\n")
    launchers.tools("sleep")
    if step is not None:
        (folder / "steps" / str(step)).mkdir(parents=True)
        (folder / "config.json").touch()
    before = len(launchers.calls("sleep"))
    done = launchers.run("_node.sh", "train", f"--workdir={folder}", *options, **env)
    return done.returncode, [int(call[1]) for call in launchers.calls("sleep")[before:]]


def test_a_node_that_lost_its_peers_asks_for_another_start_until_that_is_no_help(launchers):
    folder = launchers.base / "a run"
    assert aborting(launchers, folder, step=50) == (75, [10])
    (folder / "steps/60.damaged").mkdir()
    (folder / "steps/9").mkdir()
    assert aborting(launchers, folder) == (75, [20])
    (folder / "steps/50").rename(folder / "steps/50.damaged")  # what goes back gets no further
    assert aborting(launchers, folder) == (75, [40])
    assert aborting(launchers, folder) == (134, [])
    assert aborting(launchers, folder) == (134, [])
    assert aborting(launchers, folder, step=100) == (75, [10])  # it gets on again
    assert aborting(launchers, folder, HIPPOCAMPUS_MAX_RETRIES="1") == (134, [])


def test_each_node_counts_for_itself(launchers):
    folder = launchers.base / "run"
    assert aborting(launchers, folder, step=50, **XPK) == (75, [10])
    assert aborting(launchers, folder, **{**XPK, "NODE_RANK": "0"}) == (75, [10])


def test_an_abort_before_there_is_a_run_to_go_on_with_is_a_failure(launchers):
    folder = launchers.base / "run"
    assert aborting(launchers, folder) == (134, [])
    assert not folder.exists()


@pytest.mark.parametrize("code", [1, 64, 66, 69, 137])
def test_what_says_why_comes_through(launchers, code):
    launchers.program("python", f"#!/usr/bin/env bash\nexit {code}\n")
    assert launchers.run("_node.sh", "train", f"--workdir={launchers.base}").returncode == code


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_real_node_whose_peer_is_killed_asks_for_another_start(tmp_path, victim):
    workdir = tmp_path / "run"
    verb = tiny_run.command(workdir, train__steps=100_000, checkpoint__every_steps=20)[3:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = tiny_run.environment() | {
        "NNODES": "2", "JAX_COORDINATOR_ADDRESS": "127.0.0.1", "JAX_COORDINATOR_PORT": port,
        "JAX_NUM_CPU_DEVICES": "1", "HIPPOCAMPUS_READY_PYTHON": sys.executable,
        "HIPPOCAMPUS_HEARTBEAT_SECONDS": "5"}
    nodes = [subprocess.Popen(["bash", str(ROOT / "launch/_node.sh"), "train", *verb],
                              env=env | {"NODE_RANK": str(i)}, stderr=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL) for i in range(2)]
    try:
        give_up = time.monotonic() + 120
        while not (workdir / "steps/20").exists():
            assert time.monotonic() < give_up and not any(node.poll() for node in nodes)
            time.sleep(0.1)
        children = Path(f"/proc/{nodes[victim].pid}/task/{nodes[victim].pid}/children")
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
        assert nodes[victim].wait(20) == 137
        assert nodes[1 - victim].wait(60) == 75
    finally:
        for node in nodes:
            node.terminate()  # which a node passes on
            node.wait(60)
