"""slurm_gpu.sbatch: its directives, what it submits, and what a job does with exit codes."""

import re
import signal
import subprocess
import time

import pytest
from fake_tools import ROOT, Launchers

SCRIPT = (ROOT / "launch/slurm_gpu.sbatch").read_text()
IN_JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4",
          "SLURM_GPUS_ON_NODE": "4"}
TRAIN = ("train", "--config=x.py", "--say=it's two words")
TASK = ["bash", "launch/_slurm_task.sh", ".slurm-77", "python", "-m"]

# With an answer such as "75 64,75" srun ends with 75 after its tasks have noted 64 and 75.
NOTES = r"""
task=0
while [ "$1" != launch/_slurm_task.sh ]; do shift; done
for note in ${text//,/ }; do echo "$note" >"$2/$task"; task=$((task + 1)); done
"""


@pytest.fixture
def launchers(tmp_path):
    made = Launchers(tmp_path)
    made.tools("sleep")
    notes = made.base / "notes"
    notes.write_text(NOTES)
    made.env |= {"SLURM_SUBMIT_DIR": str(made.root), "FAKE_NOTES": str(notes)}
    made.answer("squeue", *["0 RUNNING"] * 9)
    return made


def story(launchers):
    """What the job did, in order, without the look at its state."""
    return [" ".join(call) if call[0] != "srun" else "srun"
            for call in launchers.calls() if call[0] != "squeue"]


# --- Directives ----------------------------------------------------------------------------------


def directives():
    found = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT, re.MULTILINE))
    assert len(found) == SCRIPT.count("\n#SBATCH")  # each could be read, and none is there twice
    return found


def test_the_directives_ask_for_one_task_per_gpu():
    found = directives()
    assert found["gres"] == f"gpu:{found['ntasks-per-node']}"
    assert not {"gpus-per-task", "gpus", "ntasks"} & set(found)


def test_the_signal_goes_to_the_tasks_in_time_to_save():
    assert directives()["signal"] == "TERM@120"  # "B:TERM" would reach the batch shell alone
    assert "requeue" in directives() and directives()["open-mode"] == "append"


def test_sbatch_sees_every_directive():
    """It stops reading at the first line that is neither a comment nor empty."""
    head = re.split(r"^[^#\n]", SCRIPT, maxsplit=1, flags=re.MULTILINE)[0]
    assert head.count("\n#SBATCH") == SCRIPT.count("\n#SBATCH")


def test_no_directive_holds_a_variable_which_sbatch_would_not_expand():
    assert not [value for value in directives().values() if "$" in value]


# --- On the login node ---------------------------------------------------------------------------


def test_it_hands_itself_to_sbatch_with_one_task_per_gpu(launchers):
    done = launchers.run("slurm_gpu.sbatch", "--nodes=2", "--gpus=4", "--partition=a b",
                         "--time=1:00:00", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [["sbatch", "--nodes=2", "--ntasks-per-node=4", "--gres=gpu:4",
                                  "--partition=a b", "--time=1:00:00", "launch/slurm_gpu.sbatch",
                                  *TRAIN]]


@pytest.mark.parametrize("verb", ["sample", "probe"])
def test_what_needs_no_peers_gets_one_gpu(launchers, verb):
    launchers.run("slurm_gpu.sbatch", "--nodes=2", "--gpus=4", verb, "--workdir=w")
    assert launchers.calls()[0][1:4] == ["--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1"]


def test_the_environment_is_set_up_before_it_is_needed_without_internet(launchers):
    del launchers.env["HIPPOCAMPUS_READY_PYTHON"]
    launchers.program("python3", """#!/usr/bin/env bash
printf '%s\\x1f' python "$@" >>"$FAKE_LOG"; printf '\\x1e' >>"$FAKE_LOG"
case "$*" in
  *ensurepip*) echo 3.11 ;;
  *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
""")
    done = launchers.run("slurm_gpu.sbatch", "--gpus=4", "train")
    assert done.returncode == 0, done.stderr
    calls = launchers.calls()
    assert calls[-1][0] == "sbatch"
    assert any(call[-1] == ".[cuda12]" for call in calls)
    before = len(calls)
    job = launchers.run("slurm_gpu.sbatch", "train", **IN_JOB)  # finds it ready
    assert job.returncode == 0, job.stderr
    assert [call[0] for call in launchers.calls()[before:]] == ["srun"]


# --- In the job ----------------------------------------------------------------------------------


def test_one_task_per_gpu_and_the_expected_devices(launchers):
    done = launchers.run("slurm_gpu.sbatch", *TRAIN, **IN_JOB)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == [[
        "srun", "--kill-on-bad-exit=1", "--ntasks=8", "--ntasks-per-node=4", *TASK,
        "hippocampus.train", *TRAIN[1:], "--expect_devices=8"]]


def test_sample_is_one_task(launchers):
    launchers.run("slurm_gpu.sbatch", "sample", "--workdir=w", **IN_JOB)
    assert launchers.calls() == [["srun", "--kill-on-bad-exit=1", "--nodes=1", "--ntasks=1", *TASK,
                                  "hippocampus.sample", "--workdir=w"]]


def test_one_task_for_a_node_of_four_gpus_is_refused(launchers):
    done = launchers.run("slurm_gpu.sbatch", "train", **{**IN_JOB, "SLURM_NTASKS_PER_NODE": "1"})
    assert done.returncode == 64
    assert done.stderr.splitlines()[0] == "error: 1 tasks per node, but 4 GPUs"
    assert launchers.calls() == []


def test_the_copy_that_slurm_runs_finds_the_checkout(launchers):
    spool = launchers.base / "spool"
    spool.write_text(SCRIPT)
    command = ["bash", str(spool), *TRAIN]
    env = launchers.env | IN_JOB
    assert subprocess.run(command, cwd="/", env=env, capture_output=True).returncode == 0
    env["SLURM_SUBMIT_DIR"] = str(launchers.base)
    lost = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True)
    assert lost.returncode == 64 and "is not a checkout" in lost.stderr


def test_tasks_are_offline_and_without_proxies(launchers):
    launchers.program("srun", '#!/usr/bin/env bash\nenv >"$FAKE_LOG.env"\n')
    launchers.run("slurm_gpu.sbatch", "train", **IN_JOB, https_proxy="p", HTTP_PROXY="p")
    seen = (launchers.base / "log.env").read_text().splitlines()
    assert {"HF_HUB_OFFLINE=1", "HF_DATASETS_OFFLINE=1", "PYTHONUNBUFFERED=1"} <= set(seen)
    assert not [line for line in seen if "proxy" in line.lower()]
    launchers.run("slurm_gpu.sbatch", "train", **IN_JOB, HF_HUB_OFFLINE="0")
    seen = (launchers.base / "log.env").read_text().splitlines()
    assert {"HF_HUB_OFFLINE=0", "HF_DATASETS_OFFLINE=0"} <= set(seen)


# --- Exit codes ----------------------------------------------------------------------------------


def test_a_saved_run_goes_back_into_the_queue(launchers):
    launchers.answer("srun", "75 75,75")
    assert launchers.run("slurm_gpu.sbatch", "train", **IN_JOB).returncode == 75
    assert story(launchers) == ["srun", "scontrol requeue 77"]


@pytest.mark.parametrize("state", ["0 COMPLETING", "0 CANCELLED", "0 PREEMPTED", "1 gone"])
def test_a_cancelled_job_stays_cancelled(launchers, state):
    launchers.answer("squeue", state)
    launchers.answer("srun", "75 75,75")
    assert launchers.run("slurm_gpu.sbatch", "train", **IN_JOB).returncode == 75
    assert story(launchers) == ["srun"]


@pytest.mark.parametrize(("answer", "code"), [
    ("64 64,64", 64), ("75 64,75,75", 64), ("143 66,75", 66), ("137 64", 64)])
def test_a_bad_config_is_not_tried_again_though_its_peers_were_stopped(launchers, answer, code):
    launchers.answer("srun", answer)
    assert launchers.run("slurm_gpu.sbatch", "train", **IN_JOB).returncode == code
    assert story(launchers) == ["srun"]


def test_a_crash_is_tried_again_with_growing_waits_and_then_given_up(launchers):
    launchers.answer("srun", *["134 1,134"] * 9)
    assert launchers.run("slurm_gpu.sbatch", "train", **IN_JOB).returncode == 1
    assert story(launchers) == ["srun", "sleep 10", "srun", "sleep 20", "srun", "sleep 40", "srun"]


def test_a_lost_peer_is_tried_again_with_growing_waits_and_not_for_ever(launchers):
    launchers.answer("srun", *["134 134,134"] * 9)
    assert launchers.run("slurm_gpu.sbatch", "train", **IN_JOB).returncode == 134
    assert story(launchers) == ["srun", "sleep 10", "srun", "sleep 20", "srun", "sleep 40", "srun"]


def test_a_crash_that_mends_itself(launchers):
    launchers.answer("srun", "134", "0")
    done = launchers.run("slurm_gpu.sbatch", "train", **IN_JOB, HIPPOCAMPUS_MAX_RETRIES="1")
    assert done.returncode == 0
    assert story(launchers) == ["srun", "sleep 10", "srun"]
    assert not list(launchers.root.glob(".slurm-*"))


@pytest.mark.parametrize(("ended_with", "code", "end_of_job"), [
    (1, 1, []), (134, 75, ["scontrol requeue 77"])])
def test_a_batch_shell_that_is_told_to_end_waits_for_its_tasks(launchers, ended_with, code,
                                                               end_of_job):
    """Where the tasks lost each other instead of saving, the job goes on from what was saved."""
    launchers.program("srun", '#!/usr/bin/env bash\necho up >"$FAKE_LOG.up"\n'
                              'read -t 0.6 <>"$FAKE_LOG.fifo"\n'
                              f"exit {ended_with}\n")
    subprocess.run(["mkfifo", str(launchers.base / "log.fifo")], check=True)
    job = launchers.start("slurm_gpu.sbatch", "train", **IN_JOB)
    until = time.monotonic() + 10
    while not (launchers.base / "log.up").exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=20)
    assert job.returncode == code  # srun's own, not 143; and no second attempt
    assert story(launchers) == end_of_job


def test_a_task_notes_its_code_and_survives_the_signal_that_its_command_gets(launchers):
    folder = launchers.base / "codes"
    folder.mkdir()
    script = launchers.root / "launch/_slurm_task.sh"
    env = launchers.env | {"SLURM_PROCID": "3"}
    saving = 'trap "exit 75" TERM; echo up; for i in 1 2 3 4 5 6 7 8 9; do sleep 0.3; done'
    (launchers.bin / "sleep").unlink()  # the real one
    task = subprocess.Popen(["bash", str(script), str(folder), "bash", "-c", saving], env=env,
                            stdout=subprocess.PIPE, start_new_session=True)
    assert task.stdout and task.stdout.readline() == b"up\n"
    subprocess.run(["kill", "-TERM", "--", f"-{task.pid}"], check=True)  # as slurmstepd does
    assert task.wait(timeout=20) == 75
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"3": "75\n"}


def test_a_task_that_is_done_notes_nothing(launchers):
    folder = launchers.base / "codes"
    folder.mkdir()
    script = str(launchers.root / "launch/_slurm_task.sh")
    done = subprocess.run(["bash", script, str(folder), "true"], env=launchers.env)
    assert (done.returncode, list(folder.iterdir())) == (0, [])
