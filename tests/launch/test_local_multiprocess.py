"""local_multiprocess.sh with stand-ins for the program, and with the program itself."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
from fake_tools import ROOT, Launchers, read_words

# Does what FAKE_<process id> says, after noting its arguments and what matters of its environment.
PROGRAM = r"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 4242; exit; fi
id=0
for word in "$@"; do case $word in --process_id=*) id=${word#*=} ;; esac; done
{ printf '%s\x1f' "$id" "${JAX_PLATFORMS:-}" "${JAX_NUM_CPU_DEVICES:-}" \
    "${JAX_LOCAL_DEVICE_IDS:-}" "${JAX_COORDINATOR_BIND_ADDRESS:-}" "$@"
  printf '\x1e'; } >>"$FAKE_LOG.$id"
do=FAKE_$id
eval "${!do:-exit 0}"
"""
WORK = 'for ((i = 0; i < 200; i++)); do sleep 0.05; done; exit 0'
SAVES = f"""trap 'echo TERM >>"$FAKE_LOG.signals"; exit 75' TERM
trap 'echo INT >>"$FAKE_LOG.signals"; exit 75' INT
echo "$id is up"; : >"$FAKE_LOG.up.$id"; {WORK}"""
DEAF = f'trap "" TERM INT; : >"$FAKE_LOG.up.$id"; {WORK}'


@pytest.fixture
def launchers(tmp_path):
    made = Launchers(tmp_path)
    made.program("python", PROGRAM)
    return made


def seen(launchers, process):
    text = Path(f"{launchers.log}.{process}").read_text()
    return text.split("\x1e")[0].split("\x1f")[:-1]


def wait_for_up(launchers, n):
    end = time.monotonic() + 10
    while not all(Path(f"{launchers.log}.up.{i}").exists() for i in range(n)):
        assert time.monotonic() < end
        time.sleep(0.02)


def signals(launchers):
    return Path(f"{launchers.log}.signals").read_text().split()


# --- What is started -----------------------------------------------------------------------------


def test_each_process_gets_its_number_its_devices_and_the_coordinator(launchers):
    done = launchers.run("local_multiprocess.sh", "--processes=2", "--devices=4", "train",
                         "--config=x.py", "two words")
    assert done.returncode == 0, done.stderr
    for i in range(2):
        assert seen(launchers, i) == [
            str(i), "cpu", "4", "", "127.0.0.1:4242", "-m", "hippocampus.train", "--config=x.py",
            "two words", "--coordinator_address=127.0.0.1:4242", "--num_processes=2",
            f"--process_id={i}", "--expect_devices=8"]


def test_one_process_for_each_gpu_which_all_stay_visible(launchers):
    done = launchers.run("local_multiprocess.sh", "--gpus=2", "--port=9", "evaluate", "--workdir=w")
    assert done.returncode == 0, done.stderr
    assert seen(launchers, 1) == [
        "1", "", "", "1", "127.0.0.1:9", "-m", "hippocampus.evaluate", "--workdir=w",
        "--coordinator_address=127.0.0.1:9", "--num_processes=2", "--process_id=1",
        "--expect_devices=2"]


def test_sample_is_one_process_without_a_coordinator(launchers):
    assert launchers.run("local_multiprocess.sh", "sample", "--workdir=w").returncode == 0
    assert seen(launchers, 0) == ["0", "cpu", "1", "", "", "-m", "hippocampus.sample",
                                  "--workdir=w"]
    assert not Path(f"{launchers.log}.1").exists()


def test_the_dry_run_prints_one_command_a_process(launchers):
    done = launchers.run("local_multiprocess.sh", "--dry-run", "--processes=3", "--port=9", "train")
    commands = [read_words(line) for line in done.stdout.splitlines()]
    assert [words[-2] for words in commands] == [f"--process_id={i}" for i in range(3)]
    assert all(words[0] == "env" and words[-1] == "--expect_devices=3" for words in commands)


def test_the_environment_of_a_scheduler_and_proxies_do_not_reach_the_processes(launchers):
    done = launchers.run("local_multiprocess.sh", "train", FAKE_1='env >"$FAKE_LOG.env"',
                         SLURM_PROCID="5", OMPI_COMM_WORLD_RANK="3", http_proxy="p")
    assert done.returncode == 0, done.stderr
    names = {line.split("=")[0] for line in Path(f"{launchers.log}.env").read_text().splitlines()}
    assert not names & {"SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "http_proxy"}


def test_process_0_speaks_and_the_others_are_heard_when_they_fail(launchers):
    speak = 'echo "here is $id"'
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=speak, FAKE_1=speak)
    assert done.stdout == "here is 0\n" and "here is 1" not in done.stderr
    assert not list(launchers.base.glob("hippocampus.*"))
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=speak, FAKE_1=speak + "; exit 9")
    assert done.returncode == 9
    assert "  here is 1" in done.stderr.splitlines()


# --- How it ends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second", "code"), [
    (0, 0, 0), (75, 75, 75), (0, 75, 75), (64, 64, 64), (66, 66, 66)])
def test_the_exit_code_is_what_the_processes_say(launchers, first, second, code):
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=f"exit {first}",
                         FAKE_1=f"exit {second}")
    assert done.returncode == code


@pytest.mark.parametrize("code", [1, 64, 66, 137])
def test_a_failure_ends_the_others_at_once_and_is_the_answer(launchers, code):
    started = time.monotonic()
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=SAVES, FAKE_1=f"exit {code}")
    assert done.returncode == code
    assert time.monotonic() - started < 8  # not the ten seconds of work
    assert "a process has failed" in done.stderr


def test_what_a_process_says_once_it_was_told_to_end_does_not_count(launchers):
    lost = SAVES.replace("exit 75", "exit 66")
    assert lost != SAVES
    started = time.monotonic()
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=lost,
                         FAKE_1='until [ -f "$FAKE_LOG.up.0" ]; do sleep 0.05; done; exit 1')
    assert done.returncode == 1
    assert time.monotonic() - started < 8


def test_an_abort_for_a_lost_peer_asks_for_another_start(launchers):
    """JAX ends a process that lost its peers in this way; a scheduler knows 75."""
    started = time.monotonic()
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=SAVES,
                         FAKE_1="echo lost; kill -ABRT $$")
    assert done.returncode == 75
    assert time.monotonic() - started < 8  # the others are ended as after any failure
    assert "  lost" in done.stderr.splitlines()
    assert "a process lost its peers" in done.stderr


@pytest.mark.parametrize(("end", "code"), [("kill -KILL $$", 137), ("exit 1", 1), ("exit 66", 66)])
def test_the_failure_that_the_others_aborted_for_wins(launchers, end, code):
    # Both are gone before the launcher looks, so that none counts as told to end.
    gone = 'until [ -f "$FAKE_LOG.gone" ]; do sleep 0.01; done; '
    done = launchers.run("local_multiprocess.sh", "train", FAKE_0=gone + "kill -ABRT $$",
                         FAKE_1=': >"$FAKE_LOG.gone"; ' + end)
    assert done.returncode == code
    assert "lost its peers" not in done.stderr


def test_a_straggler_is_killed_when_its_time_is_over(launchers):
    done = launchers.run("local_multiprocess.sh", "--grace=1", "train", FAKE_0="exit 0",
                         FAKE_1=DEAF)
    assert done.returncode == 137
    assert "killing what still runs" in done.stderr


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_a_signal_reaches_every_process_once_and_75_comes_back(launchers, name):
    run = launchers.start("local_multiprocess.sh", "train", FAKE_0=SAVES, FAKE_1=SAVES)
    wait_for_up(launchers, 2)
    run.send_signal(getattr(signal, f"SIG{name}"))
    run.communicate(timeout=20)
    assert run.returncode == 75
    assert signals(launchers) == [name, name]


def test_ctrl_c_on_a_terminal_reaches_every_process_once(launchers):
    """The terminal signals its whole foreground group; a second signal would lose the save."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = ["bash", "launch/local_multiprocess.sh", "train"]
        os.chdir(launchers.root)
        os.execvpe("bash", command, launchers.env | {"FAKE_0": SAVES, "FAKE_1": SAVES})
    try:
        wait_for_up(launchers, 2)
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    finally:
        os.close(terminal)
    assert signals(launchers) == ["INT", "INT"]


def test_processes_do_not_outlive_the_launcher_that_fails(launchers):
    """When the launcher ends for a reason of its own, it takes them with it."""
    noted = 'echo $$ >"$FAKE_LOG.pid.$id"; ' + DEAF
    run = launchers.start("local_multiprocess.sh", "train", FAKE_0=noted, FAKE_1=noted)
    wait_for_up(launchers, 2)
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=20)
    for i in range(2):
        pid = int(Path(f"{launchers.log}.pid.{i}").read_text())
        end = time.monotonic() + 5
        while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{pid}").exists()


# --- For real ------------------------------------------------------------------------------------


def real(workdir, *flags, **changes):
    """The launcher on the checkout itself, with the tiny config on 2 processes of 2 devices."""
    verb = tiny_run.command(workdir, **changes)[3:]
    command = ["bash", str(ROOT / "launch/local_multiprocess.sh"), "--processes=2", "--devices=2",
               "train", *verb, *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=tiny_run.environment() | {"HIPPOCAMPUS_READY_PYTHON": sys.executable})


def test_real_processes_meet_and_count_their_devices(tmp_path):
    run = real(tmp_path / "run", "--expect_devices=5")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 64, out + err
    assert "5" in err and "4" in err and "devices" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_real_run_is_stopped_saved_and_goes_on_to_its_end(tmp_path):
    run = real(tmp_path / "run", train__steps=100000)
    assert run.stdout
    for line in run.stdout:
        if line.startswith("step"):
            break
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 75, out + err
    (saved,) = [int(path.name) for path in (tmp_path / "run/steps").iterdir()
                if path.name.isdecimal()]
    again = real(tmp_path / "run", train__steps=saved + 2)
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, out + err
    assert f"going on from step {saved}" in out
