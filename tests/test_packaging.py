"""What is published: the wheel, and the facts that files beside the code state about it."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = """jax flax optax orbax-checkpoint chex ml_collections tokenizers datasets tensorboardX
    jaxtyping numpy rich"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def source_version():
    """`hippocampus.__version__`, read without importing JAX."""
    text = (ROOT / "hippocampus" / "__init__.py").read_text()
    found = re.search(r"^__version__(?:: \w+)? = (.+)$", text, re.MULTILINE)
    assert found, "hippocampus/__init__.py states no __version__"
    return ast.literal_eval(found[1])


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"hippocampus-{source_version()}.dist-info"
    assert {name.split("/")[0] for name in names} == {"hippocampus", info}
    assert "hippocampus/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    code = [name for name in names if not name.startswith(info)]
    assert not [name for name in code if "__pycache__" in name or "/tests/" in name]


def test_the_wheel_holds_every_module_and_template_of_the_checkout(wheel):
    package = ROOT / "hippocampus"
    files = {str(path.relative_to(ROOT)) for pattern in ("*.py", "*/templates/*")
             for path in package.rglob(pattern)}
    assert any(name.endswith("page.css") for name in files)
    assert files <= set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_is_the_same_for_every_platform(wheel):
    assert wheel.name == f"hippocampus-{source_version()}-py3-none-any.whl"


def test_the_required_packages_are_declared(project):
    assert set(REQUIRED.split()) <= set(map(name_of, project["dependencies"]))


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_an_accelerator_extra_asks_for_the_same_jax(project, extra):
    (jax,) = (r for r in project["dependencies"] if name_of(r) == "jax")
    assert project["optional-dependencies"][extra] == [jax.replace("jax", f"jax[{extra}]", 1)]


def test_planning_gets_the_compiler_of_the_tpu_extra_and_its_conflicts(project):
    extras = project["optional-dependencies"]
    assert extras["plan"] == extras["tpu"]
    conflicts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["conflicts"]
    with_gpu = [{entry["extra"] for entry in conflict} for conflict in conflicts]
    assert [{"cuda12", "cuda13", extra} in with_gpu for extra in ("tpu", "plan")] == [True, True]


def test_the_dev_extra_holds_what_the_test_command_calls(project):
    tools = set(map(name_of, project["optional-dependencies"]["dev"]))
    assert {"pytest", "ruff", "mypy", "import-linter", "build", "hatchling"} <= tools


def test_nothing_that_unpickles_is_required(project):
    assert not {"dill", "cloudpickle", "joblib", "torch"} & set(
        map(name_of, project["dependencies"])
    )


def test_the_citation_parses_and_states_the_version():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == source_version()
    assert citation["license"] == "MIT"
    assert citation["title"].startswith("Hippocampus")
    assert citation["authors"] == [{"name": "The Hippocampus authors"}]


def test_the_license_is_mit(project):
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License\n\nCopyright (c) 2026 The Hippocampus authors\n")
    assert "without restriction" in text
    assert project["license"] == "MIT"


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_wheel_works_outside_the_checkout(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")

    def call(*arguments):
        done = subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    call("-m", "pip", "install", "--quiet", str(wheel))
    found = call("-c", "import hippocampus; print(hippocampus.__version__, hippocampus.__file__)")
    assert found.split()[0] == source_version()
    assert str(tmp_path) in found
    assert "--config" in call("-m", "hippocampus.train", "--help")
