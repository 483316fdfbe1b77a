"""./run, ./test and .ci/run against stand-ins for Python, pip, uv and nvidia-smi."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = """bash cat chmod cksum cp dirname env grep head ln mkdir mv readlink rm rmdir sed sh sleep
    sort tail tr uname"""
QUICKSTART = "--config=configs/quickstart.py"

# Records its arguments and behaves like Python as far as the scripts can see. FAKE_FAILS names
# modules that end with status 3 ("ruff@3.11"); FAKE_PIP says what happens in the middle of pip.
FAKE_PYTHON = r"""#!/bin/sh
version=@VERSION@
{ printf 'python%s\t' $version; printf '%s\t' "$@"; echo; } >>"$FAKE_LOG"
case "$1 ${2:-}" in
  *ensurepip*) echo $version; exit @PROBE_STATUS@ ;;
  -c*) exit 0 ;;
  "- "*) PYTHONPATH=$FAKE_PACKAGES exec "$FAKE_REAL_PYTHON" -S "$@" ;;
esac
case "$2" in
  venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; : >"$3/pyvenv.cfg" ;;
  pip)
    case "${FAKE_PIP:-}" in
      killed) kill -9 "$PPID" ;;
      orphaned) kill -9 "$PPID"; sleep 0.6; echo >"$FAKE_LOG.orphan" ;;
      slow) sleep 0.5 ;;
      gives-uv) case "$*" in *" uv") cp "$FAKE_UV" "${0%/*}/uv" ;; esac ;;
    esac ;;
  pytest) echo "pytest on $version, JAX_PLATFORMS=${JAX_PLATFORMS:-unset}" ;;
esac
case " ${FAKE_FAILS:-} " in
  *" $2@$version "*) echo "ERROR: $2 does not like this"; exit 3 ;;
esac
exit 0
"""

FAKE_NVIDIA_SMI = r"""#!/bin/sh
printf 'nvidia-smi\t\n' >>"$FAKE_LOG"
"""

FAKE_UV = r"""#!/bin/sh
{ printf 'uv\t'; printf '%s\t' "$@"; echo; } >>"$FAKE_LOG"
"""

# A pyenv shim of a version that is not activated.
BROKEN_SHIM = """#!/bin/sh
echo "pyenv: python: command not found" >&2
exit 127
"""


class Checkout:
    """A copy of the scripts in a folder with a space, and a PATH of stand-ins."""

    def __init__(self, base: Path):
        self.base = base
        self.root = base / "a checkout"
        self.bin, self.home, self.dev = base / "bin", base / "home", base / "dev"
        self.packages = base / "packages"
        self.log = base / "log"
        for folder in (self.root, self.bin, self.home, self.dev, self.packages):
            folder.mkdir()
        for name in ("run", "test", "pyproject.toml"):
            shutil.copy2(ROOT / name, self.root / name)
        for name in ("launch", ".ci"):
            shutil.copytree(ROOT / name, self.root / name)
        tools = base / "tools"
        tools.mkdir()
        for tool in TOOLS.split():
            where = shutil.which(tool)
            assert where, tool
            (tools / tool).symlink_to(where)
        self.env = {
            "PATH": f"{self.bin}:{tools}",
            "HOME": str(self.home),
            "HIPPOCAMPUS_DEV": str(self.dev),
            "FAKE_LOG": str(self.log),
            "FAKE_PACKAGES": str(self.packages),
            "FAKE_REAL_PYTHON": sys.executable,
        }

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def lock(self) -> Path:
        return self.root / ".venv.lock"

    def python(self, path="python3", version="3.11", probe_status=0):
        text = FAKE_PYTHON.replace("@VERSION@", version)
        return self.program(path, text.replace("@PROBE_STATUS@", str(probe_status)))

    def program(self, path, text):
        target = self.bin / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755)
        return target

    def nvidia(self, answer, status=0):
        self.program("nvidia-smi", FAKE_NVIDIA_SMI + f"echo '{answer}'\nexit {status}\n")

    def package(self, name, version, **files):
        info = self.packages / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file, text in files.items():
            (info / file).write_text(text)

    def start(self, *command, cwd=None, **env):
        return subprocess.Popen(
            command,
            cwd=cwd or self.root,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def sh(self, *command, cwd=None, **env):
        process = self.start(*command, cwd=cwd, **env)
        try:
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def run(self, *arguments, **env):
        """Starts ./run, which must succeed; returns what it ran meanwhile."""
        before = len(self.calls())
        done = self.sh("./run", *arguments, **env)
        assert done.returncode == 0, done.stderr
        return self.calls()[before:]

    def calls(self):
        text = self.log.read_text() if self.log.exists() else ""
        return [tuple(line.split("\t")[:-1]) for line in text.splitlines()]


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    made.python()
    return made


def installed(calls):
    """What pip or uv was asked to install, in order."""
    return [call[-1] for call in calls if "install" in call]


def trained(calls):
    """The arguments that each start of the training got."""
    return [call[3:] for call in calls if call[1:3] == ("-m", "hippocampus.train")]


def modules(calls):
    return [call[2] for call in calls if call[1:2] == ("-m",)]


# --- Arguments -----------------------------------------------------------------------------------


def test_no_arguments_train_the_quickstart(checkout):
    done = checkout.sh("./run")
    assert trained(checkout.calls()) == [(QUICKSTART,)]
    assert done.stderr.splitlines()[-1] == f"$ .venv/bin/python -m hippocampus.train {QUICKSTART}"
    assert (done.returncode, done.stdout) == (0, "")


def test_arguments_pass_through_unchanged(checkout):
    arguments = ("--config=configs/shakespeare.py", "--workdir=two words", "it's", "", "$HOME *")
    done = checkout.sh("./run", *arguments)
    assert trained(checkout.calls()) == [arguments]
    assert done.stderr.splitlines()[-1].endswith(
        "--config=configs/shakespeare.py '--workdir=two words' 'it'\\''s' '' '$HOME *'"
    )


@pytest.mark.parametrize("config", ["--config=x.py", "--config x.py", "-config=x.py"])
def test_a_given_config_is_the_only_one(checkout, config):
    assert trained(checkout.run("--debug", *config.split())) == [("--debug", *config.split())]


def test_the_quickstart_goes_in_front_of_overrides(checkout):
    calls = checkout.run("--config.train.steps=5", "--check")
    assert trained(calls) == [(QUICKSTART, "--config.train.steps=5", "--check")]


def test_starts_from_any_directory(checkout):
    for script in ("run", "test"):
        assert checkout.sh(str(checkout.root / script), cwd="/").returncode == 0
    assert checkout.venv.is_dir()


def test_status_of_the_training_is_passed_on(checkout):
    assert checkout.sh("./run", FAKE_FAILS="hippocampus.train@3.11").returncode == 3


# --- Accelerators --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("580.65.06, 9.0", ".[cuda13]"),
        ("610.10, 12.0", ".[cuda13]"),
        ("580.65.06, 7.5", ".[cuda13]"),
        ("580.65.06, 7.0", ".[cuda12]"),
        ("580.65.06, 9.0\n580.65.06, 6.1", ".[cuda12]"),
        ("579.99, 9.0", ".[cuda12]"),
        ("525.60.13, 8.0", ".[cuda12]"),
        ("524.99, 8.0", "."),
        ("NVIDIA-SMI has failed", "."),
    ],
)
def test_the_nvidia_driver_decides_the_cuda_version(checkout, answer, wanted):
    checkout.nvidia(answer)
    assert installed(checkout.run()) == [wanted]


def test_a_driver_too_old_is_said(checkout):
    checkout.nvidia("470.10, 8.0")
    assert "needs NVIDIA driver 525 or newer; with 470" in checkout.sh("./run").stderr


def test_a_failing_nvidia_smi_means_cpu(checkout):
    checkout.nvidia("580.65.06, 9.0", status=9)
    assert installed(checkout.run()) == ["."]


def test_a_tpu_comes_before_a_gpu(checkout):
    checkout.nvidia("580.65.06, 9.0")
    (checkout.dev / "accel0").touch()
    assert installed(checkout.run()) == [".[tpu]"]


@pytest.mark.parametrize("evidence", ["nothing", "variable", "metadata"])
def test_a_vfio_device_is_a_tpu_only_on_a_tpu_host(checkout, evidence):
    (checkout.dev / "vfio").mkdir()
    (checkout.dev / "vfio" / "0").touch()
    checkout.program("curl", f"#!/bin/sh\nexit {0 if evidence == 'metadata' else 7}\n")
    env = {"TPU_WORKER_ID": "0"} if evidence == "variable" else {}
    assert installed(checkout.run(**env)) == ["." if evidence == "nothing" else ".[tpu]"]


@pytest.mark.parametrize("accel", ["cpu", "cuda12", "cuda13", "tpu"])
def test_the_override_wins_over_the_devices(checkout, accel):
    checkout.nvidia("580.65.06, 9.0")
    (checkout.dev / "accel0").touch()
    wanted = "." if accel == "cpu" else f".[{accel}]"
    assert installed(checkout.run(HIPPOCAMPUS_ACCEL=accel)) == [wanted]


def test_an_unknown_accelerator_is_refused(checkout):
    done = checkout.sh("./run", HIPPOCAMPUS_ACCEL="cuda")
    error, hint = done.stderr.splitlines()
    assert done.returncode == 64
    assert "HIPPOCAMPUS_ACCEL=cuda" in error
    assert "cuda13" in hint
    assert checkout.calls() == []


# --- When a set-up is done again -----------------------------------------------------------------


def test_the_second_start_does_nothing_but_train(checkout):
    checkout.nvidia("580.65.06, 9.0")
    first = checkout.run()
    assert installed(first) == [".[cuda13]"]
    assert ("nvidia-smi",) in first
    assert checkout.run() == [("python3.11", "-m", "hippocampus.train", QUICKSTART)]


def test_the_development_tools_are_added_to_what_run_made(checkout):
    checkout.run()
    assert checkout.sh("./test").returncode == 0
    assert installed(checkout.calls()) == [".", ".[dev]"]
    assert modules(checkout.calls()).count("venv") == 1
    assert installed(checkout.run()) == []


def test_the_accelerator_and_the_tools_are_installed_together(checkout):
    checkout.sh("./test", HIPPOCAMPUS_ACCEL="cuda12")
    assert installed(checkout.calls()) == [".[dev,cuda12]"]


def test_a_changed_pyproject_is_installed_into_the_same_environment(checkout):
    checkout.run()
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    calls = checkout.run()
    assert installed(calls) == ["."]
    assert "venv" not in modules(calls)


def test_another_accelerator_gets_a_fresh_environment(checkout):
    checkout.run(HIPPOCAMPUS_ACCEL="cuda12")
    calls = checkout.run(HIPPOCAMPUS_ACCEL="cuda13")
    assert modules(calls) == ["venv", "pip", "hippocampus.train"]
    assert installed(calls) == [".[cuda13]"]


def test_another_python_gets_a_fresh_environment(checkout):
    checkout.run()
    other = checkout.python("other/python", version="3.12")
    calls = checkout.run(HIPPOCAMPUS_PYTHON=str(other))
    assert calls[-1][0] == "python3.12"
    assert "venv" in modules(calls)


def test_a_moved_checkout_gets_a_fresh_environment(checkout):
    checkout.run()
    checkout.root = checkout.root.rename(checkout.base / "moved")
    assert "venv" in modules(checkout.run())


@pytest.mark.parametrize("second", ["run", "test"])
def test_a_set_up_killed_half_way_is_done_again(checkout, second):
    assert checkout.sh("./run", FAKE_PIP="killed").returncode == -9
    assert checkout.lock.is_symlink()
    assert trained(checkout.calls()) == []
    done = checkout.sh(f"./{second}")
    assert done.returncode == 0, done.stderr
    assert len(installed(checkout.calls())) == 2
    assert not checkout.lock.is_symlink()


def test_a_killed_addition_does_not_leave_run_believing_all_is_well(checkout):
    checkout.run()
    checkout.sh("./test", FAKE_PIP="killed")
    assert installed(checkout.run()) == ["."]


def test_half_installed_packages_are_installed_again(checkout):
    packages = checkout.venv / "lib" / "python3.11" / "site-packages"
    checkout.sh("./run", FAKE_PIP="killed")
    for name in ("whole-1.dist-info", "half-1.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.dist-info" / "INSTALLER").write_text("pip\n")
    checkout.run()
    assert [path.name for path in packages.iterdir()] == ["whole-1.dist-info"]


def test_an_environment_whose_python_does_not_run_is_made_again(checkout):
    checkout.run()
    python = checkout.venv / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/python")
    (checkout.venv / "leftover").touch()
    assert "venv" in modules(checkout.run())
    assert not (checkout.venv / "leftover").exists()


def test_a_folder_that_is_no_environment_is_never_emptied(checkout):
    mine = checkout.base / "mine"
    mine.mkdir()
    (mine / "thesis.tex").touch()
    checkout.run(HIPPOCAMPUS_VENV=str(mine))
    assert (mine / "thesis.tex").exists()


def test_an_environment_made_by_hand_is_taken_over(checkout):
    checkout.sh("python3", "-m", "venv", ".venv")
    (checkout.venv / "kept").touch()
    assert "venv" not in modules(checkout.run())
    assert (checkout.venv / "kept").exists()


def test_a_failed_installation_says_so_and_is_tried_again(checkout):
    done = checkout.sh("./run", FAKE_FAILS="pip@3.11")
    assert done.returncode == 69
    assert "ERROR: pip does not like this" in done.stderr
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert str(checkout.root / ".venv.setup.log") in hint
    assert not checkout.lock.is_symlink()
    assert installed(checkout.run()) == ["."]


def test_uv_installs_where_it_is_present(checkout):
    checkout.program("uv", FAKE_UV)
    calls = checkout.run()
    python = str(checkout.venv / "bin" / "python")
    assert ("uv", "pip", "install", "--python", python, "--quiet", "--editable", ".") in calls
    assert "pip" not in modules(calls)


# --- The lock ------------------------------------------------------------------------------------


def test_two_starts_at_once_set_up_once(checkout):
    starts = [checkout.start("./run", FAKE_PIP="slow") for _ in range(2)]
    errors = [start.communicate(timeout=20)[1] for start in starts]
    assert [start.returncode for start in starts] == [0, 0]
    assert len(installed(checkout.calls())) == 1
    assert len(trained(checkout.calls())) == 2
    assert sorted(error.count("waiting for another set-up") for error in errors) == [0, 1]


def test_the_lock_of_a_dead_process_is_taken_over_by_one_of_many(checkout):
    dead = subprocess.Popen(["true"])
    dead.wait()
    checkout.lock.symlink_to(f"{platform.node()}:{dead.pid}")
    starts = [checkout.start("./run", FAKE_PIP="slow") for _ in range(4)]
    for start in starts:
        start.communicate(timeout=20)
    assert [start.returncode for start in starts] == [0] * 4
    assert len(installed(checkout.calls())) == 1


def test_an_installer_that_outlives_its_shell_is_waited_for(checkout):
    orphan = checkout.start("./run", FAKE_PIP="orphaned")
    orphan.wait(timeout=20)
    assert not (checkout.base / "log.orphan").exists()
    done = checkout.sh("./run")
    assert "waiting for another set-up to finish" in done.stderr
    assert done.returncode == 0
    assert (checkout.base / "log.orphan").exists()
    assert installed(checkout.calls()) == [".", "."]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_zombie_does_not_hold_the_lock(checkout):
    zombie = subprocess.Popen(["true"])
    time.sleep(0.2)  # it has ended, and nobody has waited for it
    checkout.lock.symlink_to(f"{platform.node()}:{zombie.pid}")
    assert installed(checkout.run()) == ["."]
    zombie.wait()


@pytest.mark.parametrize("owner", ["alive", "another host"])
def test_a_living_lock_is_waited_for(checkout, owner):
    host = platform.node() if owner == "alive" else "another-host"
    checkout.lock.symlink_to(f"{host}:{os.getpid() if owner == 'alive' else 99999999}")
    waiter = checkout.start("./run")
    assert "waiting for another set-up to finish" in waiter.stderr.readline()
    time.sleep(0.3)
    assert waiter.poll() is None
    assert installed(checkout.calls()) == []
    checkout.lock.unlink()
    waiter.communicate(timeout=20)
    assert waiter.returncode == 0
    assert installed(checkout.calls()) == ["."]


# --- Which Python --------------------------------------------------------------------------------


def test_python3_is_preferred_when_it_is_new_enough(checkout):
    checkout.python("python3.13", version="3.13")
    assert checkout.run()[-1][0] == "python3.11"


def test_the_next_python_is_taken_when_python3_is_too_old(checkout):
    checkout.python(version="3.9")
    checkout.program("python3.13", BROKEN_SHIM)
    checkout.python("python3.12", version="3.12")
    assert checkout.run()[-1][0] == "python3.12"


def test_a_python_that_cannot_make_environments_is_passed_over(checkout):
    checkout.python(version="3.11", probe_status=1)
    checkout.python(checkout.home / ".pyenv/versions/3.12.1/bin/python", version="3.12")
    assert checkout.run()[-1][0] == "python3.12"


@pytest.mark.parametrize(
    ("version", "probe_status", "error", "hint"),
    [
        (None, 0, "Python 3.11 or newer is needed; found none", "apt install python3.11"),
        ("3.10", 0, "Python 3.11 or newer is needed; found 3.10", "apt install python3.11"),
        ("2.7", 1, "Python 3.11 or newer is needed; found 2.7", "apt install python3.11"),
        ("3.12", 1, "cannot make virtual environments", "apt install python3.12-venv"),
    ],
)
def test_without_a_usable_python_two_lines_help(tmp_path, version, probe_status, error, hint):
    checkout = Checkout(tmp_path)
    if version:
        checkout.python(version=version, probe_status=probe_status)
    done = checkout.sh("./run")
    lines = done.stderr.splitlines()[-2:]
    assert done.returncode == 64
    assert lines[0].startswith("error: ") and error in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]
    assert not checkout.lock.is_symlink()


def test_a_python_asked_for_is_not_replaced_by_another(checkout):
    old = checkout.python("old/python", version="3.10")
    done = checkout.sh("./run", HIPPOCAMPUS_PYTHON=str(old))
    assert done.returncode == 64
    assert f"found 3.10 at {old}" in done.stderr


# --- The present interpreter ---------------------------------------------------------------------

PRESENT = {"HIPPOCAMPUS_NO_VENV": "1"}


@pytest.fixture
def present(checkout):
    """A checkout whose interpreter sees pip and nothing else."""
    pip = pytest.importorskip("pip")
    (checkout.packages / "pip").symlink_to(Path(pip.__file__).parent)
    return checkout


def constraints(calls):
    call = next(call for call in calls if "--constraint" in call)
    return Path(call[call.index("--constraint") + 1]).read_text().split()


def test_the_present_jax_is_left_alone(present):
    present.nvidia("580.65.06, 9.0")
    present.package("jax", "0.10.3")
    present.package("jaxlib", "0.10.4")
    present.package("jax_cuda12_plugin", "0.10.4")
    calls = present.run(**PRESENT)
    assert installed(calls) == ["."]
    assert constraints(calls) == ["jax==0.10.3", "jax_cuda12_plugin==0.10.4", "jaxlib==0.10.4"]
    assert not present.venv.exists()
    assert calls[-1] == ("python3.11", "-m", "hippocampus.train", QUICKSTART)


def test_a_present_jax_that_does_not_fit_is_refused(present):
    present.package("jax", "0.7.2")
    done = present.sh("./run", **PRESENT)
    assert done.returncode == 64
    assert "has jax 0.7.2; needed is jax<0.13,>=0.10.2" in done.stderr
    assert installed(present.calls()) == []


def test_without_a_jax_the_present_interpreter_gets_the_right_one(present):
    present.nvidia("580.65.06, 9.0")
    calls = present.run(**PRESENT)
    assert installed(calls) == [".[cuda13]"]
    assert constraints(calls) == []


def test_nothing_is_installed_when_nothing_is_missing(present):
    names = "flax optax orbax-checkpoint chex ml_collections tokenizers datasets tensorboardX"
    for name in [*names.split(), "jaxtyping", "numpy", "rich", "etils", "grain",
                 "matplotlib", "pillow", "jinja2", "scipy", "safetensors", "xxhash", "flatbuffers"]:
        present.package(name, "99" if name not in ("flax", "orbax-checkpoint") else "0.12.10")
    present.package("jax", "0.10.3")
    url = '{"url": "' + present.root.as_uri() + '"}'
    present.package("hippocampus", "0.1.0", **{"direct_url.json": url})
    assert installed(present.run(**PRESENT)) == []


# --- ./test and .ci/run --------------------------------------------------------------------------


def test_lint_comes_before_the_tests(checkout):
    done = checkout.sh("./test", "--full", "-k", "a or b", HIPPOCAMPUS_TPU_PYTHON="/python")
    calls = checkout.calls()
    assert modules(calls)[-3:] == ["ruff", "mypy", "pytest"]
    assert "importlinter" in calls[-2][2]
    assert calls[-1] == ("python3.11", "-m", "pytest", "-q", "--full", "-k", "a or b")
    assert done.stdout == "pytest on 3.11, JAX_PLATFORMS=cpu\n"


@pytest.mark.parametrize(("cores", "workers"), [(1, None), (2, "2"), (4, "4"), (64, "4")])
def test_files_of_tests_are_shared_out_over_the_cores(checkout, cores, workers):
    checkout.program("nproc", f"#!/bin/sh\necho {cores}\n")
    done = checkout.sh("./test", "tests/ops", "-k", "a or b")
    given = ("-n", workers, "--dist", "loadfile", "--no-loadscope-reorder") if workers else ()
    assert checkout.calls()[-1][2:] == ("pytest", "-q", *given, "tests/ops", "-k", "a or b")
    assert done.stdout == "pytest on 3.11, JAX_PLATFORMS=cpu\n"


@pytest.mark.parametrize(("arguments", "env"), [
    ("-n 0", {}), ("-n3", {}), ("-p no:randomly", {}), ("--pdb", {}), ("-x -s", {}), ("--full", {}),
    ("", {"HIPPOCAMPUS_ACCEL": "cuda12"}), ("", {"JAX_PLATFORMS": "cuda"})])
def test_one_process_runs_the_tests_where_it_must_or_was_asked_to(checkout, arguments, env):
    checkout.program("nproc", "#!/bin/sh\necho 2\n")
    checkout.sh("./test", *arguments.split(), HIPPOCAMPUS_TPU_PYTHON="/python", **env)
    assert checkout.calls()[-1][2:] == ("pytest", "-q", *arguments.split())


def test_the_slow_tests_get_a_second_environment_for_the_tpu_compiler(checkout):
    checkout.python("python3.12", version="3.12")
    assert checkout.sh("./test", "--full").returncode == 0
    installs = [call for call in checkout.calls() if "install" in call]
    assert [(call[0], call[-1]) for call in installs] == [
        ("python3.11", ".[dev]"), ("python3.12", ".[tpu]")]
    again = checkout.sh("./test", "--full")
    assert again.returncode == 0 and "Setting up" not in again.stderr
    assert len([call for call in checkout.calls() if "install" in call]) == 2


@pytest.mark.parametrize("forbidden", ["", "1"])
def test_the_package_is_compiled_once_where_its_processes_may_not(checkout, forbidden):
    assert checkout.sh("./test", PYTHONDONTWRITEBYTECODE=forbidden).returncode == 0
    found = [call[1:] for call in checkout.calls() if "compileall" in call]
    assert found == [("-m", "compileall", "-q", "hippocampus")] * bool(forbidden)


@pytest.mark.parametrize("arguments", [[], ["--fullest"]])
def test_the_quick_tests_need_no_second_environment(checkout, arguments):
    assert checkout.sh("./test", *arguments).returncode == 0
    assert not (checkout.root / ".venv.tpu").exists()


def test_the_slow_tests_run_without_a_tpu_compiler_where_none_can_be_installed(checkout):
    checkout.python("python3.12", version="3.12")
    done = checkout.sh("./test", "--full", FAKE_FAILS="pip@3.12")
    assert done.returncode == 0 and "there is no compiler for TPUs here" in done.stderr
    assert checkout.calls()[-1][:3] == ("python3.11", "-m", "pytest")


def test_a_tpu_compiler_of_ones_own_is_taken(checkout):
    assert checkout.sh("./test", "--full", HIPPOCAMPUS_TPU_PYTHON="/python").returncode == 0
    assert not (checkout.root / ".venv.tpu").exists()


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_a_lint_finding_stops_before_the_tests(checkout, tool):
    done = checkout.sh("./test", FAKE_FAILS=f"{tool}@3.11")
    assert done.returncode == 1
    assert f"{tool} does not like this" in done.stderr
    assert "pytest" not in modules(checkout.calls())


@pytest.mark.parametrize(
    ("env", "platforms"),
    [({"JAX_PLATFORMS": "cuda"}, "cuda"), ({"HIPPOCAMPUS_ACCEL": "tpu"}, "unset")],
)
def test_the_tests_leave_the_cpu_only_when_asked(checkout, env, platforms):
    assert checkout.sh("./test", **env).stdout.endswith(f"JAX_PLATFORMS={platforms}\n")


def test_ci_checks_a_newer_python_and_closes_with_the_full_run(checkout):
    checkout.program("python3.13", BROKEN_SHIM)
    checkout.python(checkout.home / ".pyenv/versions/3.12.1/bin/python", version="3.12")
    done = checkout.sh("bash", ".ci/run", "--full")
    assert done.returncode == 0, done.stderr
    lanes = [call for call in checkout.calls() if "pytest" in call]
    assert [lane[0] for lane in lanes] == ["python3.12", "python3.11"]
    assert lanes[0][-2:] == ("-k", "golden or public_api or resume")
    assert lanes[1][-1] == "--full"
    assert done.stdout.splitlines()[-1] == "pytest on 3.11, JAX_PLATFORMS=cpu"
    assert (checkout.root / ".venv.lane2").is_dir()


def test_the_newer_python_reads_only_files_that_can_have_one_of_its_tests(checkout):
    checkout.python("python3.12", version="3.12")
    (checkout.root / "tests/runs").mkdir(parents=True)
    for name, text in (("runs/test_a.py", "def test_a_Resume_of_something(): ..."),
                       ("runs/test_b.py", "def test_of_something_else(): ..."),
                       ("test_public_api.py", ""), ("resume.py", "")):
        (checkout.root / "tests" / name).write_text(text)
    assert checkout.sh("bash", ".ci/run").returncode == 0
    lanes = [call for call in checkout.calls() if "pytest" in call]
    assert lanes[0][-3:] == ("golden or public_api or resume", "tests/runs/test_a.py",
                                 "tests/test_public_api.py")
    assert "golden or public_api or resume" not in lanes[1]


@pytest.mark.parametrize("fails", ["pytest@3.11", "pytest@3.12", "pytest@3.11 pytest@3.12"])
def test_ci_fails_when_a_lane_fails(checkout, fails):
    checkout.python("python3.12", version="3.12")
    done = checkout.sh("bash", ".ci/run", FAKE_FAILS=fails)
    assert done.returncode == 3
    assert len([call for call in checkout.calls() if "pytest" in call]) == 2


def test_ci_says_when_there_is_no_second_lane(checkout):
    done = checkout.sh("bash", ".ci/run")
    assert done.returncode == 0
    assert "lane 2: skipped, there is no Python 3.13 or 3.12" in done.stdout
    assert len([call for call in checkout.calls() if "pytest" in call]) == 1


@pytest.mark.parametrize("status", [0, 1])
def test_ci_sets_up_with_uv_and_with_pip_where_that_fails(checkout, status):
    checkout.python("python3.12", version="3.12")
    uv = checkout.base / "uv"
    uv.write_text(FAKE_UV + f"exit {status}\n")
    uv.chmod(0o755)
    done = checkout.sh("bash", ".ci/run", FAKE_PIP="gives-uv", FAKE_UV=str(uv))
    assert done.returncode == 0, done.stderr
    asked = [call[4] for call in checkout.calls() if call[:3] == ("uv", "pip", "install")]
    assert sorted(Path(python).parts[-3] for python in asked) == [".venv", ".venv.lane2"]
    by_pip = [call[0] for call in checkout.calls() if call[-1] == ".[dev]" and "-m" in call]
    assert sorted(by_pip) == (["python3.11", "python3.12"] if status else [])


def test_ci_says_when_pip_has_to_set_up(checkout):
    checkout.python("python3.12", version="3.12")
    done = checkout.sh("bash", ".ci/run")
    assert done.returncode == 0 and "uv: could not be installed, so pip" in done.stdout


APT_GET = """#!/bin/sh
{ printf 'apt-get\\t'; printf '%s\\t' "$@"; echo; } >>"$FAKE_LOG"
exit ${FAKE_APT_STATUS:-0}
"""


def on_debian_as_root():
    release = Path("/etc/os-release")
    return os.geteuid() == 0 and release.is_file() and "ID=debian" in (
        release.read_text().splitlines())


def apt_calls(checkout):
    return [call for call in checkout.calls() if call[0] == "apt-get"]


@pytest.mark.skipif(not on_debian_as_root(), reason="CI installs a browser as root on Debian only")
@pytest.mark.parametrize("status", ["0", "100"])
def test_ci_brings_a_browser_and_does_without_where_it_cannot(checkout, status):
    checkout.program("apt-get", APT_GET)
    done = checkout.sh("bash", ".ci/run", FAKE_APT_STATUS=status)
    assert done.returncode == 0, done.stderr
    first, *rest = apt_calls(checkout)
    assert first == ("apt-get", "update")
    assert [(call[1], call[-1]) for call in rest] == [("install", "chromium")] * (status == "0")
    assert ("browser: could not be installed" in done.stdout) == (status != "0")


def test_ci_takes_the_browser_that_is_there(checkout):
    checkout.program("apt-get", APT_GET)
    checkout.program("chromium", "#!/bin/sh\n")
    assert checkout.sh("bash", ".ci/run").returncode == 0
    assert apt_calls(checkout) == []


@pytest.mark.parametrize("command", ["./run", "./test"])
def test_only_ci_installs_a_browser(checkout, command):
    checkout.program("apt-get", APT_GET)
    assert checkout.sh(command).returncode == 0
    assert apt_calls(checkout) == []


# --- For real ------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_fresh_clone_trains_with_one_command(tmp_path):
    clone, home = tmp_path / "a clone", tmp_path / "home"
    home.mkdir()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin"}
    # Where the system Python does not fit, the one that runs this test does.
    fits = ["/bin/sh", "-c", "python3 -c 'import tomllib, ensurepip'"]
    if subprocess.run(fits, env=env).returncode:
        env["HIPPOCAMPUS_PYTHON"] = str(Path(sys.executable).resolve())

    def start(*arguments):
        return subprocess.run(
            ["./run", *arguments], cwd=clone, env=env, capture_output=True, text=True
        )

    first = start("--config.train.steps=20")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Setting up .venv" in first.stderr
    assert f"-m hippocampus.train {QUICKSTART} --config.train.steps=20" in first.stderr

    second = start("--config.train.steps=20")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "Setting up" not in second.stderr
