"""Errors a user can act on: one line, one hint, the right exit code, nothing written."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny_run

import hippocampus.sample
import hippocampus.train
from hippocampus import verbs
from hippocampus.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HippocampusError,
    OutOfMemoryError,
    Stopped,
)
from hippocampus.verbs import Parser, run_verb, take_overrides


def outcome(capsys, main, arguments=()) -> tuple[int, list[str]]:
    """Exit code and the lines of stderr of a verb in this process."""
    with pytest.raises(SystemExit) as caught:
        run_verb(main, list(arguments))
    return caught.value.code, capsys.readouterr().err.splitlines()


def raising(error: BaseException):
    def main(arguments):
        raise error
    return main


@pytest.mark.parametrize(("error", "code", "first"), [
    (ConfigError("bad field", "good field"), 64, "error: bad field"),
    (DataError("no text", "a text"), 66, "error: no text"),
    (CheckpointError("no step", "train"), 66, "error: no step"),
    (OutOfMemoryError("full", "smaller"), 64, "error: full"),
    (Stopped("SIGTERM at step 3", "again"), 75, "stopped: SIGTERM at step 3"),
    (HippocampusError("odd", "?"), 1, "error: odd"),
])
def test_error_is_one_line_with_a_hint_and_its_exit_code(capsys, error, code, first):
    assert outcome(capsys, raising(error)) == (code, [first, f"hint: {error.hint}"])


def test_control_c_outside_the_loop_is_one_line_too(capsys):
    code, lines = outcome(capsys, raising(KeyboardInterrupt()))
    assert code == 75 and lines[0] == "stopped: interrupted"


def test_error_without_a_hint_is_one_line(capsys):
    assert outcome(capsys, raising(ConfigError("bad"))) == (64, ["error: bad"])


def test_verb_that_ends_well_exits_0(capsys):
    assert outcome(capsys, lambda arguments: None) == (0, [])


def test_debug_shows_the_traceback_above_the_error(capsys):
    code, lines = outcome(capsys, raising(ConfigError("bad", "good")), ["--debug"])
    assert code == 64 and lines[0].startswith("Traceback")
    assert lines[-2:] == ["error: bad", "hint: good"]


@pytest.mark.parametrize("error", [
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmany\nlines"),
    ValueError("RESOURCE_EXHAUSTED: something"), MemoryError(), MemoryError("Unable to allocate"),
])
def test_out_of_memory_says_what_to_lower(capsys, error):
    code, lines = outcome(capsys, raising(error))
    assert code == 64 and len(lines) == 2
    assert lines[0].startswith("error: out of memory: ")
    assert "train.batch_size" in lines[1] and lines[1].startswith("hint: ")


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_verb(raising(ZeroDivisionError("bug")), [])


# ---------------------------------------------------------------- arguments

def test_overrides_are_taken_out_of_the_arguments():
    rest, overrides = take_overrides(
        ["--config=x.py", "--config.a.b=1=2,3", "--workdir", "w", "--config.c", "-1",
         "--config.d=", "--config.a.b=4"])
    assert rest == ["--config=x.py", "--workdir", "w"]
    assert overrides == {"a.b": "4", "c": "-1", "d": ""}


@pytest.mark.parametrize("arguments", [["--config.a.b"], ["--config.a.b", "--check"],
                                       ["--config.a.b", "--config.c=1"]])
def test_override_without_a_value_is_refused(arguments):
    with pytest.raises(ConfigError, match=r"^--config\.a\.b has no value"):
        take_overrides(arguments)


@pytest.mark.parametrize("arguments", [["--workdri=x"], ["--work=x"], ["x"], ["--debug=1"]])
def test_flag_that_is_unknown_or_abbreviated_is_refused(arguments):
    parser = Parser("train", "")
    parser.add_argument("--workdir")
    with pytest.raises(ConfigError) as caught:
        parser.parse_args(arguments)
    assert caught.value.hint == "python -m hippocampus.train --help"


GOOD = """from hippocampus.config_files import defaults

def get_config():
    return defaults()
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to stand in, with nothing but a good config beside it."""
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "binary.txt").write_bytes(b"abc\0\xff\xfe" * 100)
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


BAD_CONFIG = [
    ([], 64, "--config"),
    (["--config=none.py"], 64, "no config file"),
    (["--config=../good.py", "--config.train.stepz=1"], 64, "train.stepz is not a field"),
    (["--config=../good.py", "--config.train.steps=many"], 64, "train.steps is 'many'"),
    (["--config=../good.py", "--config.train.steps"], 64, "has no value"),
    (["--config=../good.py", "--config.model.n_heads=3"], 64, "model.n_heads = 3"),
    (["--config=../good.py", "--config.mesh.data=3"], 64, "mesh.data=3"),
    (["--config=../good.py", "--config.mesh.rules=(('kernel$', 'nowhere'),)"], 64, "'nowhere'"),
    (["--config=../good.py", "--config.model.attention.backend=cudnn"], 64, "cudnn"),
    (["--config=../good.py", "--stepz=1"], 64, "--stepz"),
]
BAD_INPUT = [
    (["--config=../good.py", "--config.data.corpus=../none.txt"], 66, "there is no file"),
    (["--config=../good.py", "--config.data.corpus=../empty.txt"], 66, "empty"),
    (["--config=../good.py", "--config.data.corpus=../blank.txt"], 66, "empty"),
    (["--config=../good.py", "--config.data.corpus=../binary.txt"], 66, "not UTF-8 text"),
    (["--config=../good.py", "--config.data.corpus=../short.txt"], 66, "tokens"),
    (["--config=../good.py", "--config.data.corpus=.."], 66, "is a directory"),
    (["--config=../good.py", "--config.data.corpus=pydok"], 66, "unknown corpus"),
    (["--config=../good.py", "--workdir=../good.py"], 64, "is a file"),
    (["--config=../good.py", "--workdir=../good.py/run"], 64, "cannot write to"),
    (["--config=../good.py", "--workdir=.."], 64, "is not empty and not a run folder"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    *BAD_CONFIG, *BAD_INPUT, *(([*flags, "--check"], *rest) for flags, *rest in BAD_CONFIG)])
def test_bad_input_of_train_is_refused_and_nothing_is_written(
        capsys, here, arguments, code, words):
    before = sorted(here.parent.rglob("*"))
    found, lines = outcome(capsys, hippocampus.train.main, arguments)
    assert found == code and len(lines) == 2, lines
    assert lines[0].startswith("error: ") and words in lines[0]
    assert lines[1].startswith("hint: ")
    assert sorted(here.parent.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "code", "words"), [
    ([], 64, "--workdir"),
    (["--workdir=none"], 66, "no run folder at none"),
    (["--workdir=.", "--weights=best"], 64, "--weights"),
    (["--workdir=.", "--seed=-1"], 66, "no run folder"),
    (["--workdir=.", "--max_new_tokens=few"], 64, "--max_new_tokens"),
])
def test_bad_input_of_sample_is_refused(capsys, here, arguments, code, words):
    found, lines = outcome(capsys, hippocampus.sample.main, arguments)
    assert found == code and len(lines) == 2 and words in lines[0]
    assert not list(here.iterdir())


def test_check_says_how_often_the_text_is_read_where_epochs_are_asked_for(capsys, here):
    hippocampus.train.main(["--config=../good.py", "--config.train.epochs=2.5", "--check"])
    assert "until the text is read 2.5 times" in capsys.readouterr().out


def test_check_describes_the_config_and_trains_nothing(capsys, here):
    hippocampus.train.main(["--config=../good.py", "--check", "--config.model.d_model=64"])
    out = capsys.readouterr().out
    assert "good: the config is good" in out and "vocabulary 256" in out
    assert "MiB per device" in out and "4,096 per step" in out
    assert not list(here.iterdir())


def test_help_exits_0_and_names_the_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        run_verb(hippocampus.train.main, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--config" in out and "--workdir" in out and "--check" in out


# ---------------------------------------------------------------- real processes

@pytest.mark.parametrize(("changes", "code", "words"), [
    ({"train__batch_size": 6, "train__grad_accumulation": 4}, 64, "train.batch_size = 6"),
    ({"data__corpus": "/no/such/text.txt"}, 66, "there is no file /no/such/text.txt"),
])
def test_process_ends_with_the_exit_code_and_two_lines(tmp_path, changes, code, words):
    done = tiny_run.run(tiny_run.command(tmp_path / "run", **changes))
    lines = done.stderr.splitlines()
    assert done.returncode == code and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and words in lines[0] and lines[1].startswith("hint: ")
    assert not list(tmp_path.iterdir())


def test_batch_that_does_not_divide_the_mesh_ends_with_64(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    done = tiny_run.run(tiny_run.command(tmp_path / "run", train__batch_size=6))
    assert done.returncode == 64 and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        "error: train.batch_size = 6 does not divide over 4 devices",
        "hint: the nearest multiple is 4"]


def test_sample_process_of_a_missing_run_ends_with_66(tmp_path):
    done = tiny_run.run([sys.executable, "-m", "hippocampus.sample",
                         f"--workdir={tmp_path / 'none'}"])
    assert done.returncode == 66 and len(done.stderr.splitlines()) == 2, done.stderr
    assert not list(tmp_path.iterdir())


def test_own_warnings_are_one_line_and_others_say_where_they_come_from(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    here = str(Path(verbs.__file__).parent / "generation" / "loading.py")

    def main(arguments):
        warnings.warn_explicit("step 3 is damaged", UserWarning, here, 1)
        warnings.warn_explicit("old", DeprecationWarning, "elsewhere.py", 7)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            run_verb(main, [])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: step 3 is damaged"
    assert "elsewhere.py:7: DeprecationWarning: old" in lines[1]


@pytest.mark.parametrize(("platform", "words"), [
    ("nonsense", "Unable to initialize backend 'nonsense'"), ("cuda", "JAX_PLATFORMS=cuda")])
def test_a_platform_that_is_not_there_is_one_clear_line(tmp_path, platform, words):
    if platform == "cuda" and any(
            importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        pytest.skip("CUDA is installed")
    command = tiny_run.command(tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True,
                          env={**tiny_run.environment(), "JAX_PLATFORMS": platform})
    assert done.returncode == 64, done.stderr
    (error, hint) = done.stderr.splitlines()
    assert error.startswith("error: no device: ") and words in error
    assert "unset JAX_PLATFORMS" in hint and not (tmp_path / "run").exists()
