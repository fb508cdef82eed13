"""`make dashboard`: all measurements on one page."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from pipeline.commands.artifacts import Answer
from pipeline.commands.profile import MEASUREMENTS

_PAGE = "dashboard.html"

log = logging.getLogger("edgeline")


def dashboard(root: Path) -> Answer:
    """Draw the page, and open it in a browser if stdout is a terminal.

    The database is opened read-only. The page is written to its folder, or to the current folder if that is read-only.
    """
    from pipeline.reports import dashboard as page
    from pipeline.timing.results_db import Results

    overview = Results(root / MEASUREMENTS, read_only=True).overview()
    path = page.write_beside(overview, root / _PAGE)
    log.info("%d measurements: %s", overview.measurements, path.as_uri())
    if sys.stdout.isatty():
        import webbrowser

        webbrowser.open(path.as_uri())
    return {"path": str(path), "rows": overview.measurements}
