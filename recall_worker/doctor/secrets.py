"""Do the settings expose a secret? The same notes as at the start of the worker (exposures)."""

from __future__ import annotations

import os

from ..exposures import exposures
from ..secret_files import Secrets
from .examination import NOTE, OK, Examination


async def secrets(exam: Examination) -> None:
    """`doctor` has the settings of the environment, as the worker has."""
    files = Secrets(exam.settings, os.environ).files()
    for exposure in exposures(exam.settings, files):
        exam.find(NOTE, exposure.seen, exposure.todo)
    if not any(finding.check == "secrets" for finding in exam.findings):
        exam.find(OK, "no secret is sent in the clear, or in a file that all may read")
