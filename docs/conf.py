"""How the documentation is built: ``tox -e docs``.

Sphinx, with MyST for pages in Markdown. A reference that leads nowhere is an error; one
to the documentation of Python or SQLAlchemy is not, where that cannot be reached.
"""

from __future__ import annotations

import urllib.request
from importlib.metadata import version as version_of

project = "sqla_fairpool"
author = "sqla_fairpool contributors"
copyright = author
version = release = version_of("sqla-fairpool")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore = [("py:mod", "sqla_fairpool.scheduling.policy")]  # not public
suppress_warnings = ["toc.empty_glob"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # those of the :param: lines say more

_OTHERS = {
    "python": ("https://docs.python.org/3/", r"(?!sqla).*"),
    "sqlalchemy": (
        "https://docs.sqlalchemy.org/en/21/",
        r"(sqlalchemy|Pool|QueuePool).*",
    ),
}


def _is_there(address):
    try:
        with urllib.request.urlopen(address + "objects.inv", timeout=5):
            return True
    except (OSError, ValueError):
        return False


intersphinx_mapping = {}
nitpick_ignore_regex = []
for _name, (_address, _names) in _OTHERS.items():
    if _is_there(_address):
        intersphinx_mapping[_name] = (_address, None)
    else:
        nitpick_ignore_regex.append((r"py:.*", _names))
