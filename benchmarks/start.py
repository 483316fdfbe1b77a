"""Seconds from the command to the end of the first training step: the first start and later ones.

    python benchmarks/start.py --config=configs/wt103_bpe.py

Starts `python -m hippocampus.train` in a new run folder, with a folder for compiled programs that
is empty at first, and ends it when its first step is printed. What JAX traced, lowered, compiled or
read from the folder is listed where it took more than `--over` seconds. The text is tokenized in
the first start, where its cache (`HIPPOCAMPUS_CACHE`) does not have it yet.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import Table

TRAIN = r"""import sys
import jax
def told(event, seconds, **about):
    if seconds > OVER:
        what = event.rsplit("/", 1)[-1].removesuffix("_duration").removesuffix("_sec")
        # In one piece: threads write at the same time, and `print` writes word by word.
        sys.stdout.write(f"@ {seconds:.2f} s {what} {about.get('fun_name', '')}\n")
jax.monitoring.register_event_duration_secs_listener(told)
from hippocampus.train import main
from hippocampus.verbs import run_verb
run_verb(main)
"""
MARKS = (("start: imports, devices, data", r"[0-9] parameters, .* x "),
         ("state, restoring, read-ahead", r"(compiling|reading) the training step"),
         ("the step: trace, lower, compile, run", r"step\s+1/"))


def main() -> None:
    """Prints one line for each start, with the parts below it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one start")
    parser.add_argument("--over", type=float, default=0.3)
    given, arguments = parser.parse_known_args()
    table = Table("from the command to the first step", "the first start")
    with tempfile.TemporaryDirectory() as folder:
        first = None
        for number in range(1, given.starts + 1):
            seconds, parts = start(arguments, Path(folder), number, given.over, given.limit)
            first = first or seconds
            table.add(f"start {number}", seconds, peer=first)
            print("\n".join(f"{'':31}{line}" for line in parts), flush=True)


def start(arguments: list[str], folder: Path, number: int, over: float,
          limit: float) -> tuple[float, list[str]]:
    """Seconds of one start, and lines with its parts.

    Raises:
      SystemExit: training ended before its first step.
    """
    environment = {**os.environ, "HIPPOCAMPUS_COMPILATION_CACHE": str(folder / "compiled"),
                   "PYTHONPATH": os.pathsep.join(
                       [str(Path(__file__).resolve().parents[1]),
                        *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-u", "-c", TRAIN.replace("OVER", str(over)), *arguments,
               f"--workdir={folder / f'run_{number}'}"]
    begin = last = time.perf_counter()
    parts: list[str] = []
    marks = list(MARKS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env=environment) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            now = time.perf_counter()
            seen.append(line)
            if line.startswith("@"):
                parts.append(f"  {line[2:].strip()}")
            if re.search(marks[0][1], line):  # wherever: a line may have two writers
                parts.append(f"{now - last:6.2f} s  {marks.pop(0)[0]}")
                last = now
            if not marks or now - begin > limit:
                process.kill()
                break
        if marks:
            sys.exit("".join(seen[-20:]) + f"no first step after {time.perf_counter() - begin:.0f}"
                     " s")
    return last - begin, parts


if __name__ == "__main__":
    main()
