"""The Colab notebook: its two files say the same, and it runs top to bottom at a tiny size."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "notebooks/colab.py"
NOTEBOOK = ROOT / "notebooks/colab.ipynb"
TINY = {"train.steps": 4, "data.context": 32, "model.d_model": 16, "model.n_heads": 2,
        "model.n_layers": 1, "model.mixer.width": 8, "model.mlp.width": 16,
        "model.paths": ["hopfield", "attention"], "model.hopfield.depth_schedule": [1],
        "model.segments.train": 1, "model.segments.weights": [1.0], "eval.every_steps": 0,
        "eval.max_windows": 4, "ema.decay": 0.0, "sample.every_steps": 0,
        "log.histogram_every_steps": 0, "sample.max_new_tokens": 4}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text("utf-8"))


def environment(folder, **overrides):
    """For a run of the notebook that is small and quick to compile."""
    values = TINY | {"data.corpus": str(tiny_run.corpus())} | overrides
    return tiny_run.environment() | {
        "HIPPOCAMPUS_NOTEBOOK_OVERRIDES": json.dumps(values), "MPLBACKEND": "agg",
        "HIPPOCAMPUS_NOTEBOOK_RUN": str(folder / "run"), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def code_cells(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


# --- The two files -------------------------------------------------------------------------------


def test_the_notebook_and_the_script_are_in_step(notebook):
    jupytext = pytest.importorskip("jupytext")
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.read(SCRIPT).cells]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == wanted, "make it again: jupytext --to ipynb notebooks/colab.py"
    assert notebook["metadata"]["jupytext"]["formats"] == "ipynb,py:percent"


def test_no_output_is_committed(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_what_it_asks_for_is_there(notebook):
    code = "\n".join(code_cells(notebook))
    ast.parse(code)
    for config in ast.literal_eval(re.search(r"config_name = .*# @param (\[.*\])", code)[1]):
        assert (ROOT / f"configs/{config}.py").is_file()
    words = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    for path in re.findall(r"`((?:docs|hippocampus|launch)/[\w/.]+)`", words):
        assert (ROOT / path).exists(), path


# --- Running it ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """The cells in order, in one process without a kernel; it is quicker than with one."""
    folder = tmp_path_factory.mktemp("notebook")
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=ROOT, env=environment(folder),
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_it_runs_from_top_to_bottom(first_run):
    folder, out = first_run
    assert (folder / "run/steps/4").is_dir()
    assert re.search(r"validation, step 4: \d\.\d{3} bits per byte", out)
    trained = float(re.search(r"as trained +(\d+\.\d{3})", out)[1])
    silent = [float(bits) for bits in re.findall(r"layer 0 without \w+ +(\d+\.\d{3})", out)]
    assert len(silent) == 2 and all(abs(bits - trained) > 0.0005 for bits in silent)


@pytest.mark.full
def test_reconnect_and_run_all_goes_on_in_jupyter(first_run):
    """In a real kernel, with more steps than before: no cell fails, and training resumes."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder, _ = first_run
    book = nbformat.read(NOTEBOOK, as_version=4)
    before = dict(os.environ)
    os.environ.update(environment(folder, **{"train.steps": 6}))
    os.environ.pop("MPLBACKEND")  # inline, as a person sees it
    try:
        nbclient.NotebookClient(book, timeout=300, kernel_name="python3",
                                resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.get("text") or output.get("data", {}).get("text/plain", "")
                   for output in outputs)
    assert "going on from step 4" in text
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2


def test_without_hippocampus_it_is_installed_beside_the_present_jax(tmp_path):
    """The cells up to the first import of jax, where no module of that name can be imported yet."""
    cells = SCRIPT.read_text("utf-8").split("# %%\nimport jax\n")[0]
    checkout = tmp_path / "a checkout"
    (checkout / "launch").mkdir(parents=True)
    (checkout / "launch/_bootstrap.sh").write_text(
        'set_up() { echo "set up [$*] with $HIPPOCAMPUS_PYTHON, $HIPPOCAMPUS_NO_VENV"; }\n')
    (checkout / "hippocampus").mkdir()
    (checkout / "hippocampus/__init__.py").touch()
    (checkout / "notebooks").mkdir()
    check = ("\nimportlib.invalidate_caches()\nimport hippocampus\nprint(hippocampus.__file__)\n")
    hide = ("import os, sys\n"
            "sys.path = [p for p in sys.path if not os.path.exists(p + '/hippocampus')]\n")
    done = subprocess.run([sys.executable, "-c", hide + cells + check], capture_output=True,
                          text=True, cwd=checkout / "notebooks", env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    said, where = done.stdout.splitlines()
    assert said == f"set up [] with {sys.executable}, 1"
    assert where == str(checkout / "hippocampus/__init__.py")
