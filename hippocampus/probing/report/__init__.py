"""Pages that show what lies in a folder: `write_report` of a run, `write_page` of anything.

A page is one file that needs nothing else: no script, no request, pictures and style inside it.
"""

from hippocampus.probing.report.blocks import (
    Cards,
    Command,
    Facts,
    Figures,
    Folded,
    Grid,
    Listing,
    Note,
    Section,
    Shares,
)
from hippocampus.probing.report.page import write_page
from hippocampus.probing.report.run_report import write_report

__all__ = ["Cards", "Command", "Facts", "Figures", "Folded", "Grid", "Listing", "Note", "Section",
           "Shares", "write_page", "write_report"]
