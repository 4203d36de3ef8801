"""What the settings for diagnosis cost; see :mod:`benchmarks.settings`."""

from __future__ import annotations

import pytest

from benchmarks import settings
from benchmarks.database import Database

from .conftest import Sheet


def test_diagnosis(sheet: Sheet) -> None:
    sheet.run(settings.of_diagnosis)


def test_figures(sheet: Sheet) -> None:
    sheet.run(settings.of_figures)


@pytest.mark.postgres
def test_server_tag(sheet: Sheet, place: Database) -> None:
    sheet.run(settings.of_server_tag, place=place)
