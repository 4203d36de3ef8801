"""README's tables of options, made from the table in the code.

``python tests/support/documents.py`` writes them into README.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from sqla_fairpool.launch.environment import DATABASE, VARIABLES
from sqla_fairpool.options import OPTIONS, PoolOptions

README = Path(__file__).parents[2] / "README.md"


def options():
    """Yield a row for each option of the pool."""
    yield from ("| option | default | meaning |", "|---|---|---|")
    defaults = PoolOptions.parse()
    for name, option in OPTIONS.items():
        default = getattr(defaults, name)
        shown = f"`{default}`" if isinstance(default, str) else default
        none = f"; `None` {option.none}" if option.none else ""
        yield f"| `{name}` | {shown} | {option.meaning}{none} |"


def variables():
    """Yield a row for each variable of the environment."""
    yield from ("| variable | default | stands for |", "|---|---|---|")
    yield f"| `{DATABASE}` | | the database |"
    defaults = PoolOptions.parse(ledger="host")
    for variable, name in VARIABLES.items():
        none = f"; `none` {OPTIONS[name].none}" if OPTIONS[name].none else ""
        yield f"| `{variable}` | {getattr(defaults, name)} | `{name}`{none} |"


def with_tables(text):
    """Return a document with its tables as they should be."""
    for table in (options, variables):
        begin = f"<!-- {table.__name__}: by tests/support/documents.py -->\n"
        before, after = text.split(begin)
        rest = re.sub(r"\A(\|.*\n)*", "", after)
        text = "\n".join([before + begin.strip(), *table(), rest])
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
