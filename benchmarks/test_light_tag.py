"""One quiet thread beside a flood; see :mod:`sqla_fairpool.bench.light`."""

from __future__ import annotations

import pytest

from sqla_fairpool.bench.light import CASES, light_tag

from .conftest import Sheet


@pytest.mark.parametrize("key", CASES)
def test_light_tag(sheet: Sheet, key: str) -> None:
    sheet.run(light_tag, key)
