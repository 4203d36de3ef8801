"""What the settings for diagnosis cost; see :mod:`sqla_fairpool.bench.settings`."""

from __future__ import annotations

import pytest

from sqla_fairpool.bench import settings
from sqla_fairpool.bench.stage import Place

from .conftest import Sheet


def test_diagnosis(sheet: Sheet) -> None:
    sheet.run(settings.of_diagnosis)


def test_figures(sheet: Sheet) -> None:
    sheet.run(settings.of_figures)


@pytest.mark.postgres
def test_server_tag(sheet: Sheet, place: Place) -> None:
    sheet.run(settings.of_server_tag, place=place)
