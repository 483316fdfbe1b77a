"""Runs lm-evaluation-harness: `python -m hippocampus.harness --workdir=… --tasks=…`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hippocampus.errors import ConfigError
from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags, runs the tasks, prints their table and writes it as JSON."""
    parser = Parser("harness", "Ask a trained model the questions of lm-evaluation-harness.")
    parser.add_argument("--workdir", required=True, help="run folder, or an exported folder")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include_path", type=Path, metavar="DIR", help="a folder of task files: "
                        "only they are known then, and the network is left alone")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")
    parser.add_argument("--batch_size", type=int, default=16, help="texts side by side")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema",
                        help="running average of the parameters, or the parameters")
    parser.add_argument("--step", type=int, help="a saved step (default: the best one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the JSON file (default: "
                        "evaluations/ in the run folder)")
    flags = parser.parse_args(arguments)
    for name in ("limit", "batch_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} is {value}", "it must be at least 1")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is not installed", "pip install '.[eval]'")

    if flags.include_path is not None:  # the libraries read it when they are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

    from lm_eval.utils import make_table
    from rich.console import Console

    from hippocampus.evaluation.harness import run_tasks
    from hippocampus.exports.folder import is_export, open_export
    from hippocampus.files import check_writable, write_atomically
    from hippocampus.generation.loading import load
    from hippocampus.runs.run_folder import RunFolder, environment

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is as it should be
    lm = load(flags.workdir, weights=flags.weights, step=flags.step)
    folder = RunFolder.at(flags.workdir)
    weights = flags.weights if lm.config.ema.decay else "raw"  # what a run without average has
    if is_export(folder.path):
        weights = open_export(folder.path)[2].weights
    out = flags.out or folder.evaluations
    check_writable(out)
    tasks = [task for task in flags.tasks.split(",") if task]
    found = run_tasks(lm, tasks, flags.include_path, flags.limit, flags.batch_size)
    record = {"run": str(flags.workdir), "step": lm.step, "weights": weights,
              "commit": environment()["commit"], "limit": flags.limit,
              "lm_eval": found.get("lm_eval_version"), "results": found["results"],
              "n-samples": found.get("n-samples"), "versions": found.get("versions")}
    name = re.sub(r"[^\w.-]+", "_", "-".join(tasks))[:80]
    part = f"-limit{flags.limit}" if flags.limit else ""
    path = out / f"harness-{name}-step{lm.step}-{weights}{part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=2, default=str) + "\n").encode())
    console = Console(highlight=False)
    console.print(f"{flags.workdir}, step {lm.step}, {weights} weights", soft_wrap=True)
    console.print(make_table(found), markup=False, soft_wrap=True)
    console.print(str(path), soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
