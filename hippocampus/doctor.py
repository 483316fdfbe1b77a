"""Says what this machine offers: `python -m hippocampus.doctor [--workdir=checkpoints]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Prints devices, versions, disk and a write test, and what "auto" becomes here."""
    parser = Parser("doctor", "Check this machine.")
    parser.add_argument("--workdir", default="checkpoints", help="where runs will be written")
    flags = parser.parse_args(arguments)

    from hippocampus.runs.diagnosis import diagnose

    findings = diagnose(Path(flags.workdir))
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        sys.stdout.write(f"{'ok ' if finding.good else 'BAD'}  {finding.name:<{width}}  "
                         f"{finding.text}\n")
        if finding.hint:
            sys.stdout.write(f"     {'':<{width}}  hint: {finding.hint}\n")
    bad = [finding for finding in findings if not finding.good]
    if bad:
        from hippocampus.errors import ConfigError

        raise ConfigError(f"{len(bad)} of {len(findings)} checks failed ({bad[0].name})",
                          "see the hints above")


if __name__ == "__main__":
    run_verb(main)
