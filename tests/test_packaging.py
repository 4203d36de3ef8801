"""What a new user does: install it, paste the README, read the metadata."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_metadata_names_the_one_hard_dependency():
    requires = metadata.requires("sqla-fairpool")
    hard = [r for r in requires if "extra ==" not in r]
    assert len(hard) == 1
    assert re.match(r"SQLAlchemy\s*[<>]", hard[0])
    extras = metadata.metadata("sqla-fairpool").get_all("Provides-Extra")
    assert {"postgresql", "demo", "test", "bench"} <= set(extras)


def test_build_system_stands_beside_setup_cfg_and_the_marker_of_types_is_there():
    """setup.cfg alone does not install: pip needs a build system beside it."""
    text = (ROOT / "pyproject.toml").read_text()
    assert "[build-system]" in text
    assert "[project]" not in text
    files = metadata.files("sqla-fairpool")
    assert files is not None
    import sqla_fairpool

    assert (Path(sqla_fairpool.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_readme_code_runs_when_pasted(block, tmp_path):
    for driver, file in (
        ("postgresql+psycopg2", "sqlite:///t.db"),
        ("postgresql+asyncpg", "sqlite+aiosqlite:///t.db"),
    ):
        block = block.replace(f"{driver}://app@localhost/app", file)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_readme_names_every_option_with_its_default():
    from sqla_fairpool.options import PoolOptions

    options = PoolOptions.parse()
    (section,) = re.findall(r"^\| option \|.*?\n\n", README, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|", section, re.MULTILINE)
    table = {name: default.strip("`") for name, default in rows}
    assert table == {name: str(getattr(options, name)) for name in options.names()}
