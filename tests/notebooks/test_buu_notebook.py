"""The notebook on adapters: its two files say the same, and it runs at a tiny size."""

import json
import re
import subprocess
import sys
from pathlib import Path

import chopt_run
import pytest
import quick_xla
import tiny_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "notebooks/buu.py"
NOTEBOOK = ROOT / "notebooks/buu.ipynb"
TINY = {"train.steps": 4, "data.context": 32, "train.batch_size": 4, "model.adapters.count": 1,
        "model.adapters.memory.slots": 8, "model.adapters.memory.heads": 2,
        "eval.every_steps": 0, "eval.max_windows": 4, "eval.batch_size": 4, "ema.decay": 0.0,
        "sample.every_steps": 0, "sample.max_new_tokens": 2, "log.every_steps": 1,
        "log.histogram_every_steps": 0}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text("utf-8"))


def test_the_notebook_and_the_script_are_in_step(notebook):
    jupytext = pytest.importorskip("jupytext")
    wanted = [(cell.cell_type, cell.source) for cell in jupytext.read(SCRIPT).cells]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    assert found == wanted, "make it again: jupytext --to ipynb notebooks/buu.py"


def test_no_output_is_committed(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_what_it_asks_for_is_there(notebook):
    words = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    for path in re.findall(r"`((?:docs|configs|hippocampus|launch)/[\w/.]+)`", words):
        assert (ROOT / path).exists(), path


def test_it_runs_from_top_to_bottom(tmp_path):
    """With queries of which none is written, which would take programs of its own to compile."""
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(
        {"category": "creative", "prompt": prompt, "answer": "the mat"}) + "\n"
        for prompt in ("the cat sat on", "a big dog ran to", "the dog and the cat sat on")))
    environment = tiny_run.environment() | {
        "HIPPOCAMPUS_NOTEBOOK_OVERRIDES": json.dumps(
            {"data.corpus": str(tiny_run.corpus()), **TINY}),
        "HIPPOCAMPUS_NOTEBOOK_BACKBONE": str(chopt_run.decoder()), "MPLBACKEND": "agg",
        "HIPPOCAMPUS_NOTEBOOK_RUN": str(tmp_path),
        "HIPPOCAMPUS_NOTEBOOK_QUERIES": str(tmp_path / "queries.jsonl"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": " ".join(quick_xla.FLAGS)}
    done = subprocess.run([sys.executable, str(SCRIPT)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"layer 1: mean 0\.\d+", done.stdout)
    assert re.search(r"layer 1: \d\.\d of 8 slots effective", done.stdout)
    assert re.search(r"healthy; score \d+ of 100", done.stdout)
    assert (tmp_path / "adapters/report.html").is_file()
    assert (tmp_path / "adapters/probes/adapter_answers.jsonl").is_file()
    trained, control = (int(n.replace(",", "")) for n in re.search(
        r"adapters: ([\d,]+) parameters; LoRA of rank \d+: ([\d,]+)", done.stdout).groups())
    assert control == pytest.approx(trained, rel=0.2)
