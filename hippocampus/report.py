"""Makes the page of a run: `python -m hippocampus.report --workdir=RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from hippocampus.verbs import Parser, run_verb


def main(arguments: Sequence[str]) -> None:
    """Parses flags, writes the page, and prints where it is."""
    parser = Parser("report", "Write what is in a run folder as one self-contained HTML page.")
    parser.add_argument("--workdir", required=True, help="run folder of a training, finished or "
                        "not, or an exported model")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the "
                        "folder)")
    parser.add_argument("--probes", metavar="DIR", help="folder of the probes' results (default: "
                        "probes/ in the folder)")
    flags = parser.parse_args(arguments)

    from pathlib import Path

    from rich.console import Console

    from hippocampus.errors import ConfigError
    from hippocampus.files import check_nameable, check_writable
    from hippocampus.probing.report import write_report

    if flags.out:
        check_nameable(flags.out, "the page")
    out = Path(flags.out) if flags.out else Path(flags.workdir) / "report.html"
    check_writable(out.parent)
    if out.is_dir():
        raise ConfigError(f"{out} is a folder", "--out is the page's own name, such as page.html")
    path = write_report(flags.workdir, flags.out, flags.probes)
    Console(highlight=False).print(str(path), soft_wrap=True)


if __name__ == "__main__":
    run_verb(main)
