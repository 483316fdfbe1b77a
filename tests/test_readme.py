"""What the README tells people to type, typed: twenty steps of a smaller model on a short text."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import quick_xla

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"<!-- tested -->\n```(bash|python)\n(.*?)```",
                    (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "bash"
            for line in block.strip().splitlines()]
SMALL = {"train.steps": 20, "data.corpus": "words.txt", "data.context": 32, "model.d_model": 32,
         "model.n_layers": 1, "eval.every_steps": 0, "eval.max_windows": 8,
         "sample.every_steps": 0, "sample.max_new_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the configs, and a text that is small enough for a test."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "words.txt").write_text(
        "".join(f"Return the {word}s of {i} items.\n" for i in range(150)
                for word in ("name", "value", "number")))
    return folder


def _python(arguments, folder):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, text=True, timeout=200, capture_output=True,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin",
             "HOME": str(folder), "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
             "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(quick_xla.FLAGS)})


def test_the_readme_has_commands_and_python():
    assert [language for language, _ in BLOCKS].count("python") == 1
    for verb in ("train", "sample", "evaluate", "compare", "doctor"):
        assert any(f"hippocampus.{verb}" in line for line in COMMANDS), verb


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split("hippocampus.")[1][:40])
def test_a_command_of_the_readme_does_what_it_says(line, folder):
    words = shlex.split(line)
    assert words[0] == "python"
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    result = _python(words[1:] + (small if "hippocampus.train" in line else []), folder)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    if "hippocampus.sample" in line:  # of the run that the first command made
        assert result.stdout.startswith("Return the ")
    if "hippocampus.train" in line:
        named = re.search(r"--workdir=(\S+)", line)
        workdir = folder / (named[1] if named else "checkpoints/quickstart")
        assert (workdir / "steps/20").is_dir()


def test_the_readme_s_python_does_what_it_says(folder):
    code = next(block for language, block in BLOCKS if language == "python")
    assert '{"train.steps": 20}' in code
    code = code.replace('{"train.steps": 20}', repr(SMALL))
    code += "\nassert isinstance(text, str) and bits > 0 and cache\n"
    result = _python(["-c", code], folder)
    assert result.returncode == 0, result.stderr


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target
