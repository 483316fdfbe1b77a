"""tpu_vm.sh against a stand-in for gcloud, and what it does on a worker for real."""

import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from fake_tools import FAKE_TOOL, ROOT, Launchers, read_words

SLICE = ("--name=demo", "--zone=us-z", "--project=p")
TAIL = ["--zone=us-z", "--project=p"]
TRAIN = ("train", "--config=x.py", "--workdir=/mnt/runs/a", "--say=it's two words")
STARTED = ["start", *TRAIN, "--expect_devices=4"]
BABYSIT = ("tpu_vm/tpu_vm.sh", "babysit", *SLICE, "--type=v4-8", "--spot", *TRAIN)
KINDS = {"describe": "gcloud *describe*", "create": "gcloud * create *",
         "delete": "gcloud * delete *", "copy": "gcloud * scp *", "status": "gcloud *$w status*",
         "clear": "gcloud *_worker.sh clear*", "set_up": "gcloud *_worker.sh setup*",
         "start": "gcloud *_worker.sh start*", "wait": "sleep *"}
RUNNING = "0 hippocampus: w0 running\\nhippocampus: w1 running"


def ended(*codes):
    return "0 " + "\\n".join(f"hippocampus: w{i} ended {code}" for i, code in enumerate(codes))


@pytest.fixture
def launchers(tmp_path):
    made = Launchers(tmp_path)
    made.kinds(**KINDS)
    made.tools("sleep")  # notes how long, and returns at once
    return made


def kind_of(call):
    words = " ".join(call)
    for kind in ("describe", "create", "delete", "scp"):
        if f" {kind} " in words:
            return kind
    for kind in ("status", "clear", "setup", "start", "stop", "logs", "call"):
        if f"_worker.sh {kind}" in words or f"$w {kind}" in words:
            return kind
    return f"sleep {call[1]}" if call[0] == "sleep" else "other"


def story(launchers):
    """What happened, in words, without the looks at the state."""
    kinds = map(kind_of, launchers.calls())
    return [kind for kind in kinds if kind not in ("describe", "status", "sleep 60")]


def sent(call):
    """The words that reach a worker's script."""
    command = next(word for word in call if word.startswith("--command="))[10:]
    words = read_words(command.split(" && ")[-1])
    return words[words.index("hippocampus/launch/tpu_vm/_worker.sh") + 1:]


# --- One command at a time -----------------------------------------------------------------------


@pytest.mark.parametrize(("options", "command"), [
    (["--type=v4-8"], ["tpu-vm", "create", "demo", "--accelerator-type=v4-8",
                       "--version=tpu-ubuntu2204-base", *TAIL]),
    (["--type=v5litepod-16", "--spot", "--create_flag=--network=my net"],
     ["tpu-vm", "create", "demo", "--accelerator-type=v5litepod-16",
      "--version=v2-alpha-tpuv5-lite", "--spot", "--network=my net", *TAIL]),
    (["--type=v6e-8", "--queued", "--spot"],
     ["queued-resources", "create", "demo", "--node-id=demo", "--accelerator-type=v6e-8",
      "--runtime-version=v2-alpha-tpuv6e", "--spot", *TAIL]),
    (["--type=v5p-8", "--version=mine"], ["tpu-vm", "create", "demo", "--accelerator-type=v5p-8",
                                          "--version=mine", *TAIL]),
])
def test_create(launchers, options, command):
    assert launchers.run("tpu_vm/tpu_vm.sh", "create", *SLICE, *options).returncode == 0
    assert launchers.calls() == [["gcloud", "compute", "tpus", *command]]


def test_delete(launchers):
    launchers.run("tpu_vm/tpu_vm.sh", "delete", *SLICE)
    launchers.run("tpu_vm/tpu_vm.sh", "delete", *SLICE, "--queued")
    assert [call[3:] for call in launchers.calls()] == [
        ["tpu-vm", "delete", "demo", "--quiet", *TAIL],
        ["queued-resources", "delete", "demo", "--force", "--quiet", *TAIL]]


def test_setup_copies_to_every_worker_and_installs_there(launchers):
    assert launchers.run("tpu_vm/tpu_vm.sh", "setup", *SLICE).returncode == 0
    copy, install = launchers.calls()
    assert copy[3:5] == ["tpu-vm", "scp"]
    assert copy[6:] == ["demo:", "--worker=all", "--quiet", *TAIL]
    assert install[3:7] == ["tpu-vm", "ssh", "demo", "--worker=all"]
    assert sent(install) == ["setup"]
    assert not Path(copy[5]).exists()  # the archive was made for this


def test_setup_hands_the_bucket_on(launchers):
    launchers.run("tpu_vm/tpu_vm.sh", "setup", *SLICE, "--bucket=gs://my-runs")
    assert sent(launchers.calls()[1]) == ["setup", "gs://my-runs"]


def test_what_git_ignores_and_what_is_gone_is_not_copied(launchers):
    for name in (".venv/big", "configs/new one.py", "configs/gone.py"):
        path = launchers.root / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (launchers.root / ".gitignore").write_text(".venv/\n")
    git = ["git", "-C", str(launchers.root)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "configs/gone.py", "launch"], check=True)
    (launchers.root / "configs/gone.py").unlink()
    kept = launchers.base / "kept.tar.gz"
    launchers.program("gcloud", f'#!/usr/bin/env bash\n[[ $4 != scp* ]] || cp "$5" "{kept}"\n')
    assert launchers.run("tpu_vm/tpu_vm.sh", "setup", *SLICE).returncode == 0
    with tarfile.open(kept) as archive:
        names = set(archive.getnames())
    assert {"configs/new one.py", "launch/_common.sh", "hippocampus/train.py"} <= names
    assert not names & {".venv/big", "configs/gone.py"}


def test_nothing_is_installed_when_the_copy_failed(launchers):
    launchers.answer("copy", "1 no route to host")
    assert launchers.run("tpu_vm/tpu_vm.sh", "setup", *SLICE).returncode == 1
    assert story(launchers) == ["scp"]


def test_a_run_starts_on_all_workers_and_states_its_devices(launchers):
    done = launchers.run("tpu_vm/tpu_vm.sh", "run", *SLICE, "--type=v4-8", "--env=A=b c", *TRAIN)
    assert done.returncode == 0
    (call,) = launchers.calls()
    assert "--worker=all" in call
    assert sent(call) == STARTED
    assert "--command=env A=b\\ c bash " in " ".join(call)


def test_devices_that_the_user_expects_are_not_overruled(launchers):
    launchers.run("tpu_vm/tpu_vm.sh", "run", *SLICE, "--type=v4-8", "train", "--expect_devices=2")
    assert sent(launchers.calls()[0]) == ["start", "train", "--expect_devices=2"]


@pytest.mark.parametrize("verb", ["sample", "probe"])
def test_what_needs_no_peers_runs_on_worker_0_in_front_of_you(launchers, verb):
    done = launchers.run("tpu_vm/tpu_vm.sh", "run", *SLICE, "--type=v4-8", verb, "--workdir=w")
    assert done.returncode == 0
    (call,) = launchers.calls()
    assert "--worker=0" in call and sent(call) == ["call", verb, "--workdir=w"]


def test_logs_status_and_stop(launchers):
    launchers.run("tpu_vm/tpu_vm.sh", "logs", *SLICE)
    launchers.run("tpu_vm/tpu_vm.sh", "logs", *SLICE, "--worker=3", "--lines=9", "--follow")
    launchers.run("tpu_vm/tpu_vm.sh", "stop", *SLICE, "--grace=30")
    launchers.run("tpu_vm/tpu_vm.sh", "status", *SLICE)
    first, second, stop, state, runs = launchers.calls()
    assert "--worker=0" in first and sent(first) == ["logs", "50"]
    assert "--worker=3" in second and sent(second) == ["logs", "9", "follow"]
    assert "--worker=all" in stop and sent(stop) == ["stop", "30"]
    assert state[3:] == ["tpu-vm", "describe", "demo", "--format=value(state)", *TAIL]
    assert "--worker=all" in runs and kind_of(runs) == "status"


def test_gcloud_s_failure_is_the_script_s(launchers):
    launchers.answer("create", "7 denied")
    assert launchers.run("tpu_vm/tpu_vm.sh", "create", *SLICE, "--type=v4-8").returncode == 7


@pytest.mark.parametrize(("arguments", "error"), [
    (("create", *SLICE), "--type is missing"), (("babysit", *SLICE, "train"), "--type is missing"),
    (("create", "--zone=z", "--type=v4-8"), "--name is missing"),
    (("stop", "--name=n"), "--zone is missing"), (("stop", *SLICE, "train"), "takes no verb"),
    (("babysit", *SLICE, "--type=v4-8", "sample"), "needs no babysitter"),
    (("fly", *SLICE), "no action 'fly'"), ((), "no action is given"),
    (("run", *SLICE, "--env=A", "train"), "unknown option --env")])
def test_what_is_missing_is_said(launchers, arguments, error):
    done = launchers.run("tpu_vm/tpu_vm.sh", *arguments)
    assert done.returncode == 64
    assert error in done.stderr.splitlines()[0]
    assert launchers.calls() == []


# --- Babysitting ---------------------------------------------------------------------------------


def babysit(launchers, states, reports, *options):
    launchers.answer("describe", *states)
    launchers.answer("status", *reports)
    return launchers.run(*BABYSIT[:2], *options, *BABYSIT[2:])


def test_from_nothing_to_done(launchers):
    done = babysit(launchers, ["1 ERROR: NOT_FOUND: no such node", "0 CREATING", *["0 READY"] * 9],
                   ["0 hippocampus: w0 none", RUNNING, RUNNING, ended(0, 0)])
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["create", "scp", "setup", "clear", "start"]
    start = next(call for call in launchers.calls() if kind_of(call) == "start")
    assert sent(start) == STARTED
    assert "tpu_vm.sh delete --name=demo --zone=us-z" in done.stderr


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_a_preempted_slice_is_made_again_and_the_run_goes_on(launchers, state):
    done = babysit(
        launchers,
        ["0 READY", "0 READY", f"0 {state}", "0 DELETING", "1 code=NOT_FOUND", *["0 READY"] * 9],
        ["0 hippocampus: w0 none", RUNNING, "0 hippocampus: w0 none", RUNNING, ended(0)])
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["scp", "setup", "clear", "start", "delete", "create", "scp",
                                "setup", "clear", "start"]
    starts = [sent(call) for call in launchers.calls() if kind_of(call) == "start"]
    assert starts == [STARTED, STARTED]


def test_a_queued_resource_is_waited_for_and_made_again_when_suspended(launchers):
    launchers.answer("describe", "0 WAITING_FOR_RESOURCES", "0 ACTIVE", "0 READY", "0 SUSPENDED",
                     "1 NOT_FOUND", "0 ACCEPTED", *["0 ACTIVE", "0 READY"] * 4)
    launchers.answer("status", "0 hippocampus: w0 none", "0 hippocampus: w0 none", ended(0))
    done = launchers.run("tpu_vm/tpu_vm.sh", "babysit", *SLICE, "--queued", "--type=v6e-8", *TRAIN)
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["scp", "setup", "clear", "start", "delete", "create", "scp",
                                "setup", "clear", "start"]
    create = next(call for call in launchers.calls() if kind_of(call) == "create")
    assert create[3:5] == ["queued-resources", "create"]


def test_a_saved_run_is_started_again_and_does_not_count_as_a_failure(launchers):
    done = babysit(launchers, ["0 READY"] * 40, [RUNNING, *[ended(75, 75)] * 9, ended(0, 0)])
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["sleep 10", "clear", "start"] * 9


@pytest.mark.parametrize("code", [64, 66])
def test_what_would_fail_again_is_not_tried_again(launchers, code):
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, ended(134, code)])
    assert done.returncode == code
    assert story(launchers) == []
    assert f"ended with {code}, and would again" in done.stderr


def test_failures_wait_longer_each_time_and_end(launchers):
    done = babysit(launchers, ["0 READY"] * 20, [RUNNING, *[ended(1, 134)] * 9],
                   "--max_failures=3")
    assert done.returncode == 1
    assert story(launchers) == ["sleep 10", "clear", "start", "sleep 20", "clear", "start",
                                "sleep 40", "clear", "start"]
    assert "failed 4 times in a row" in done.stderr


def test_a_lost_worker_is_waited_for_longer_each_time_and_not_for_ever(launchers):
    done = babysit(launchers, ["0 READY"] * 20, [RUNNING, *[ended(134, 134)] * 9],
                   "--max_failures=2")
    assert done.returncode == 134
    assert story(launchers) == ["sleep 10", "clear", "start", "sleep 20", "clear", "start"]
    assert "the run lost a worker, and can go on" in done.stderr


def test_why_a_worker_died_is_what_the_end_says(launchers):
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, ended(134, 137)] * 3, "--max_failures=1")
    assert done.returncode == 137
    assert "lost a worker" not in done.stderr


def test_a_long_healthy_run_wipes_out_earlier_failures(launchers):
    done = babysit(launchers, ["0 READY"] * 60,
                   [RUNNING, *[ended(134), *[RUNNING] * 10] * 4, ended(0)], "--max_failures=1")
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["sleep 10", "clear", "start"] * 4


def test_a_peer_that_died_ends_the_others_too(launchers):
    one_left = "0 hippocampus: w0 running\\nhippocampus: w1 ended 134"
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, one_left, RUNNING, ended(0, 0)])
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["sleep 10", "clear", "start"]


def test_workers_may_end_one_after_the_other_but_not_for_ever(launchers):
    one_left = "0 hippocampus: w0 ended 0\\nhippocampus: w1 running"
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, one_left, one_left, ended(0, 0)])
    assert (done.returncode, story(launchers)) == (0, [])
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, *[one_left] * 5, ended(0, 0)])
    assert (done.returncode, story(launchers)) == (0, ["sleep 10", "clear", "start"])


def test_a_run_that_a_person_stopped_stays_stopped(launchers):
    stopped = "0 hippocampus: w0 stopped 75\\nhippocampus: w1 ended 75"
    done = babysit(launchers, ["0 READY"] * 9, [RUNNING, stopped])
    assert (done.returncode, story(launchers)) == (75, [])


def test_a_run_that_goes_on_is_taken_up_but_an_ended_one_is_another(launchers):
    done = babysit(launchers, ["0 READY"] * 9, [ended(0, 0), RUNNING, ended(0, 0)])
    assert done.returncode == 0
    assert story(launchers) == ["scp", "setup", "clear", "start"]


def test_a_half_dead_slice_is_made_again(launchers):
    done = babysit(
        launchers, [*["0 READY"] * 4, "1 NOT_FOUND", *["0 READY"] * 9],
        [RUNNING, *["255 ssh: timed out"] * 3, "0 hippocampus: w0 none", RUNNING, ended(0)])
    assert done.returncode == 0, done.stderr
    assert story(launchers) == ["delete", "create", "scp", "setup", "clear", "start"]


def test_capacity_is_waited_for_without_end(launchers):
    launchers.answer("create", *["1 There is no more capacity in the zone"] * 8)
    done = babysit(launchers, [*["1 NOT_FOUND"] * 9, *["0 READY"] * 3],
                   ["0 hippocampus: w0 none", ended(0)], "--max_failures=1")
    assert done.returncode == 0, done.stderr
    waits = [kind for kind in story(launchers) if kind.startswith("sleep")]
    assert waits == [f"sleep {n}" for n in (10, 20, 40, 80, 160, 320, 600, 600)]


def test_a_slice_that_may_not_be_made_is_not_tried_for_ever(launchers):
    launchers.answer("create", *["3 PERMISSION_DENIED"] * 9)
    done = babysit(launchers, ["1 NOT_FOUND"] * 9, [], "--max_failures=2")
    assert done.returncode == 3
    assert story(launchers) == ["create", "sleep 10", "create", "sleep 20", "create"]


def test_a_login_that_ran_out_makes_no_second_slice(launchers):
    done = babysit(launchers, ["1 Reauthentication is needed"] * 9, [], "--max_failures=2")
    assert done.returncode == 69
    assert story(launchers) == ["sleep 10", "sleep 20"]


def test_a_run_folder_on_the_slice_is_warned_of(launchers):
    done = launchers.run("tpu_vm/tpu_vm.sh", "babysit", *SLICE, "--type=v4-8", "--dry-run", "train")
    assert "goes with it" in done.stderr
    assert "goes with it" not in launchers.run(*BABYSIT[:2], "--dry-run", *BABYSIT[2:]).stderr
    assert launchers.calls() == []


# --- On a worker ---------------------------------------------------------------------------------

PROGRAM = r"""#!/usr/bin/env bash
printf '%s\x1f' python "$@" >>"$FAKE_LOG"; printf '\x1e' >>"$FAKE_LOG"
if [ "$1" = -c ]; then exit 0; fi
trap 'echo "saved after TERM"; exit 75' TERM
echo "at work"
if [ -n "${FAKE_CODE:-}" ]; then exit "$FAKE_CODE"; fi
for ((i = 0; i < 100; i++)); do sleep 0.1; done
"""


@pytest.fixture
def worker(tmp_path):
    made = Launchers(tmp_path)
    made.program("python", PROGRAM)
    yield made
    made.run("tpu_vm/_worker.sh", "clear")


def status(worker):
    return worker.run("tpu_vm/_worker.sh", "status").stdout.split()[2:]


def wait_for(worker, wanted):
    end = time.monotonic() + 10
    while status(worker) != wanted and time.monotonic() < end:
        time.sleep(0.05)
    assert status(worker) == wanted


def test_a_run_on_a_worker_outlives_its_start_and_notes_its_end(worker):
    assert status(worker) == ["none"]
    started = worker.run("tpu_vm/_worker.sh", "start", *TRAIN, FAKE_CODE="66")
    assert started.returncode == 0, started.stderr
    wait_for(worker, ["ended", "66"])
    assert worker.calls("python") == [["python", "-m", "hippocampus.train", *TRAIN[1:]]]
    log = worker.run("tpu_vm/_worker.sh", "logs", "3").stdout.splitlines()
    assert log[1] == "at work" and log[2].endswith("ended with 66")


def test_stop_lets_the_run_save_and_says_who_stopped_it(worker):
    worker.run("tpu_vm/_worker.sh", "start", "train")
    wait_for(worker, ["running"])
    again = worker.run("tpu_vm/_worker.sh", "start", "train")
    assert again.returncode == 64 and "a run is going on" in again.stderr
    assert worker.run("tpu_vm/_worker.sh", "stop", "10").returncode == 0
    wait_for(worker, ["stopped", "75"])
    assert "saved after TERM" in worker.run("tpu_vm/_worker.sh", "logs", "9").stdout
    worker.run("tpu_vm/_worker.sh", "clear")
    assert status(worker) == ["none"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_run_that_vanished_without_a_note_has_ended(worker):
    worker.run("tpu_vm/_worker.sh", "start", "train")
    wait_for(worker, ["running"])
    pid = int((worker.home / "hippocampus-run/pid").read_text())
    parent = int(Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[1])
    os.kill(parent, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_for(worker, ["ended", "137"])


@pytest.fixture
def mounting(worker):
    worker.tools("sudo", "gcsfuse", "curl", "apt-get", "lsb_release")
    worker.kinds(mount="gcsfuse --implicit*")
    worker.env["HIPPOCAMPUS_RUNS"] = "/mnt/a place of a test"
    return worker


def test_a_bucket_is_mounted_at_setup_and_again_at_every_start(mounting):
    assert mounting.run("tpu_vm/_worker.sh", "setup", "gs://mine").returncode == 0
    mounting.run("tpu_vm/_worker.sh", "start", "train", FAKE_CODE="0")
    mounts = mounting.calls("gcsfuse")
    assert [call[-2:] for call in mounts] == [["mine", "/mnt/a place of a test"]] * 2
    assert "--metadata-cache-ttl-secs=0" in mounts[0]  # workers see each other's files at once
    assert not [call for call in mounting.calls() if "apt-get" in call]
    assert mounting.run("tpu_vm/_worker.sh", "setup").returncode == 0  # and without one, none
    assert len(mounting.calls("gcsfuse")) == 2


def test_gcsfuse_is_brought_along(mounting):
    (mounting.bin / "gcsfuse").unlink()
    done = mounting.run("tpu_vm/_worker.sh", "setup", "mine")
    assert done.returncode == 69 and "could not be mounted" in done.stderr
    assert [call[-1] for call in mounting.calls("sudo") if "install" in call] == ["gcsfuse"]


def test_a_run_does_not_start_where_its_folder_is_not(mounting):
    mounting.answer("mount", "0", "1 no such bucket")
    mounting.run("tpu_vm/_worker.sh", "setup", "mine")
    done = mounting.run("tpu_vm/_worker.sh", "start", "train")
    assert done.returncode == 69 and "mine could not be mounted" in done.stderr
    assert not [call for call in mounting.calls("python") if "hippocampus.train" in call]


# Runs nothing but knows its version; with pip it "installs" uv, which brings Python 3.12.
OLD_PYTHON = r"""#!/usr/bin/env bash
printf '%s\x1f' "${0##*/}" "$@" >>"$FAKE_LOG"; printf '\x1e' >>"$FAKE_LOG"
case "$*" in
  *ensurepip*) echo @VERSION@ ;;
  *"install --quiet --user uv"*)
    [ -z "${FAKE_NO_UV:-}" ] || exit 1
    mkdir -p "$HOME/.local/bin"; cp "$FAKE_UV" "$HOME/.local/bin/uv" ;;
  *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.fixture
def old_worker(tmp_path):
    made = Launchers(tmp_path)
    del made.env["HIPPOCAMPUS_READY_PYTHON"]
    made.program("python3", OLD_PYTHON.replace("@VERSION@", "3.10"))
    new = made.program("new-python", OLD_PYTHON.replace("@VERSION@", "3.12"))
    fake_uv = made.base / "uv"
    fake_uv.write_text(FAKE_TOOL + "")
    fake_uv.chmod(0o755)
    made.kinds(find="uv python find*")
    made.answer("find", f"0 {new}")
    made.env["FAKE_UV"] = str(fake_uv)
    return made


def test_an_image_with_python_3_10_gets_a_newer_one_and_the_tpu_extra(old_worker):
    done = old_worker.run("tpu_vm/_worker.sh", "setup")
    assert done.returncode == 0, done.stderr
    calls = old_worker.calls()
    assert ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"] in calls
    assert ["uv", "python", "install", "--quiet", "3.12"] in calls
    assert [call[:3] for call in calls if "venv" in call] == [["new-python", "-m", "venv"]]
    (install,) = [call for call in calls if call[:3] == ["uv", "pip", "install"]]
    assert install[-1] == ".[tpu]"
    assert any("libtpu" in call[-1] for call in calls if call[0] == "python")


def test_a_python_that_is_new_enough_is_taken_as_it_is(old_worker):
    old_worker.program("python3.11", OLD_PYTHON.replace("@VERSION@", "3.11"))
    assert old_worker.run("tpu_vm/_worker.sh", "setup").returncode == 0
    assert not [call for call in old_worker.calls() if call[0] == "uv"]


def test_without_any_way_to_a_newer_python_nothing_is_installed(old_worker):
    done = old_worker.run("tpu_vm/_worker.sh", "setup", FAKE_NO_UV="1")
    assert done.returncode == 69
    assert "Python 3.11 is missing" in done.stderr
    assert not [call for call in old_worker.calls() if "venv" in call]


def test_a_worker_that_is_not_set_up_says_so(old_worker):
    done = old_worker.run("tpu_vm/_worker.sh", "start", "train")
    assert done.returncode == 69
    assert "not set up" in done.stderr


def test_the_worker_script_is_where_the_commands_look_for_it():
    assert (ROOT / "launch/tpu_vm/_worker.sh").is_file()
