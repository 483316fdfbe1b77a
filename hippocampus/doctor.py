"""Says what this machine offers, or whether a pretrained model is read right.

    python -m hippocampus.doctor [--workdir=checkpoints]
    python -m hippocampus.doctor --backbone=PATH
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Prints devices, versions, disk and a write test, and what "auto" becomes here.

    With `--backbone`, what a pretrained model is, and how far its logits are from those of
    transformers, where that is installed.
    """
    parser = Parser("doctor", "Check this machine.")
    parser.add_argument("--workdir", default="checkpoints", help="where runs will be written")
    parser.add_argument("--backbone", type=Path, help="check this pretrained model instead: a "
                        "folder with config.json and safetensors, a .gguf or a .bin")
    flags = parser.parse_args(arguments)

    if flags.backbone:
        from hippocampus.backbones.check import check_backbone

        findings = check_backbone(flags.backbone)
    else:
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
