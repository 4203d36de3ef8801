"""One quiet thread beside a flood; see :mod:`benchmarks.light`."""

from __future__ import annotations

import pytest

from benchmarks.light import CASES, light_tag

from .conftest import Sheet


@pytest.mark.parametrize("key", CASES)
def test_light_tag(sheet: Sheet, key: str) -> None:
    sheet.run(light_tag, key)
