"""What the README tells people to type, typed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"<!-- tested -->\n```(bash|python)\n(.*?)```",
                    (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
SMALL = ["--config.train.steps=20", "--config.eval.max_windows=8", "--config.eval.every_steps=0",
         "--config.data.corpus=words.txt", "--config.log.every_steps=10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder with the configs, and a text that is small enough for a test."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "words.txt").write_text(
        "".join(f"Return the {word}s of {i} items.\n" for i in range(150)
                for word in ("name", "value", "number")))
    return folder


def _run(arguments, folder):
    return subprocess.run([sys.executable, *arguments], cwd=folder, text=True, timeout=200,
                          capture_output=True, env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
                                                    "PATH": "/usr/bin:/bin", "HOME": str(folder)})


def test_the_readme_has_commands_and_python():
    languages = [language for language, _ in BLOCKS]
    assert languages.count("bash") >= 3 and languages.count("python") == 1


def test_the_readme_s_shell_commands_do_what_it_says(folder):
    lines = [line for language, block in BLOCKS if language == "bash"
             for line in block.strip().splitlines()]
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "python"
        arguments = words[1:] + (SMALL if "hippocampus.train" in line else [])
        result = _run(arguments, folder)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        if "hippocampus.sample" in line:
            assert result.stdout.startswith("Return the ")
    assert (folder / "checkpoints/quickstart/steps/20").is_dir()
    assert (folder / "checkpoints/no-hopfield/config.json").is_file()


def test_the_readme_s_python_does_what_it_says(folder):
    code = next(block for language, block in BLOCKS if language == "python")
    code = code.replace('{"train.steps": 20}', '{"train.steps": 20, "data.corpus": "words.txt", '
                        '"eval.max_windows": 8, "eval.every_steps": 0}')
    result = _run(["-c", code + "\nassert isinstance(text, str) and bits > 0 and cache\n"], folder)
    assert result.returncode == 0, result.stderr


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert target.startswith("http") or (ROOT / target).exists(), target
