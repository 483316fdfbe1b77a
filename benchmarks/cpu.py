"""`configs/shakespeare_laptop.py` beside nanoGPT's documented laptop run, on this machine's cores.

    git clone https://github.com/karpathy/nanoGPT NANO
    python -m venv TORCH && TORCH/bin/pip install torch numpy requests
    (cd NANO && TORCH/bin/python data/shakespeare_char/prepare.py)
    python benchmarks/cpu.py --nanogpt=NANO --nanogpt_python=TORCH/bin/python

Both run as whole commands, one after the other, `--rounds` times in turn: start, compilation,
training, evaluation, checkpoints and our sample and table are all in the time. The losses are
those that each prints: ours over the whole last tenth of the text, nanoGPT's over 20 batches of it.
`--steps=300` shortens both, for a quick look at a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NANOGPT = ("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False",
           "--eval_iters=20", "--log_interval=1", "--block_size=64", "--batch_size=12",
           "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0")
NANOGPT_STEPS = 2000


@dataclass(frozen=True)
class Outcome:
    """Of one whole command: its wall time, its validation loss, and seconds of one step."""

    seconds: float
    loss: float
    step_seconds: float


def main() -> None:
    """Prints a line per run, then the ratio of the medians."""
    given = parse()
    found: dict[str, list[Outcome]] = {"hippocampus": [], "nanoGPT": []}
    for _ in range(given.rounds):
        for name, runs in found.items():
            if name == "nanoGPT" and not given.nanogpt:
                continue
            with tempfile.TemporaryDirectory() as folder:
                runs.append((ours if name == "hippocampus" else peer)(given, Path(folder)))
            print(f"{runs[-1].seconds:7.1f} s  {runs[-1].step_seconds * 1e3:6.1f} ms a step  "
                  f"validation loss {runs[-1].loss:.4f}  {name}", flush=True)
    if given.nanogpt:
        ours_s, peer_s = (statistics.median(run.seconds for run in runs)
                          for runs in found.values())
        print(f"{peer_s / ours_s:7.2f} x as fast as nanoGPT, the whole command "
              f"({os.cpu_count()} cores)")


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout with prepared shakespeare_char")
    parser.add_argument("--nanogpt_python", default=sys.executable, help="a Python with torch")
    parser.add_argument("--corpus", default="tinyshakespeare", help="or the path of its text")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0, help="0 = all of both")
    return parser.parse_args()


def ours(given: argparse.Namespace, folder: Path) -> Outcome:
    """The training verb, from an empty run folder."""
    command = [sys.executable, "-m", "hippocampus.train",
               "--config=configs/shakespeare_laptop.py", f"--workdir={folder / 'run'}",
               f"--config.data.corpus={given.corpus}"]
    if given.steps:
        command.append(f"--config.train.steps={given.steps}")
    seconds, output = timed(command, ROOT, {"JAX_PLATFORMS": "cpu"})
    rates = [float(rate) for rate in re.findall(r"([\d.]+)k tok/s", output)]
    return Outcome(seconds, last_number(r"this model, raw weights\s+([\d.]+)", output),
                   12 * 64 / (statistics.median(rates) * 1e3))


def peer(given: argparse.Namespace, folder: Path) -> Outcome:
    """nanoGPT's command of its README."""
    steps = given.steps or NANOGPT_STEPS
    command = [given.nanogpt_python, *NANOGPT, f"--max_iters={steps}",
               f"--lr_decay_iters={steps}", f"--out_dir={folder}"]
    if given.steps:
        command.append(f"--eval_interval={given.steps}")
    seconds, output = timed(command, given.nanogpt)
    steps_ms = [float(ms) for ms in re.findall(r"time ([\d.]+)ms", output)]
    return Outcome(seconds, last_number(r"val loss ([\d.]+)", output),
                   statistics.median(steps_ms) / 1e3)


def timed(command: list[str], folder: Path,
          environment: dict[str, str] | None = None) -> tuple[float, str]:
    """Wall time and output of a command that has to succeed."""
    here = os.environ | (environment or {})
    begin = time.perf_counter()
    done = subprocess.run([*map(str, command)], cwd=folder, env=here, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\nended with {done.returncode}: {' '.join(command)}")
    return seconds, done.stdout


def last_number(pattern: str, text: str) -> float:
    """The last number that a pattern finds; NaN if there is none."""
    found = re.findall(pattern, text)
    return float(found[-1]) if found else float("nan")


if __name__ == "__main__":
    main()
