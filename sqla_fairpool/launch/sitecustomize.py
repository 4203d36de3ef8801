"""Python imports this at its start, in a script that ``sqla-fairpool run`` starts.

When SQLAlchemy is imported, it puts itself in front of ``create_engine``, which then
asks :mod:`sqla_fairpool.launch` for its arguments. Until a script makes its
first engine, nothing else of this package is imported, nor is SQLAlchemy.

Rules of this file:

* It also runs in children with another interpreter, where this package is not installed
  and which may be old: only syntax of Python 2.7, so no types, and an error in here
  leaves the script as it would be without.
* It leaves no trace where a script may look: its directory is taken out of
  ``sys.path``, and another ``sitecustomize``, which it has hidden, is imported.

Covered are the script's process, its forks, and the children of ``subprocess`` and
``multiprocessing`` that inherit the environment. Not covered, because Python does not
import this then: an interpreter with ``-I``, ``-E`` or ``-S`` (whose ``sys.path`` keeps
this directory), a child without ``PYTHONPATH`` and ``FAIRPOOL_RUN``.
"""

import os
import sys

_DIRECTORY = os.path.dirname(__file__)

#: What the launcher was told, kept now: the script's environment is the script's.
_RUN = os.environ.get("FAIRPOOL_RUN", "")

#: The module whose class :class:`URL` hands an engine's keyword arguments to plugins.
#: create_engine calls that method before all else. A private name; but its copies need
#: not be found, and unlike a wrapper of create_engine it is in no script's traceback.
_MODULE, _METHOD = "sqlalchemy.engine.url", "_instantiate_plugins"


def _say(text):
    if '"verbose": true' not in _RUN:
        return
    try:
        sys.stderr.write("sqla-fairpool run: " + text + "\n")
    except (AttributeError, OSError, ValueError):
        pass  # there is none, or it is closed


# -- what create_engine is given -------------------------------------------------------

_adopt = None


def _leave_alone(run, args, kwargs):
    return kwargs


def _find():
    """Import what chooses an engine's arguments."""
    version = sys.modules["sqlalchemy"].__version__
    if version.startswith(("0.", "1.")):
        raise ImportError("SQLAlchemy " + version + " is too old")
    root = os.path.dirname(os.path.dirname(_DIRECTORY))
    installed = os.path.basename(root) in ("site-packages", "dist-packages")
    try:
        from sqla_fairpool.launch import adopt
    except ImportError as error:
        if error.name != "sqla_fairpool" or installed:
            raise  # what is installed for another interpreter is not for this one
        sys.path.append(root)  # a checkout
        try:
            from sqla_fairpool.launch import adopt
        finally:
            sys.path.remove(root)
    return adopt


def _arguments(args, kwargs):
    """Return the keyword arguments that create_engine gets for those given."""
    global _adopt
    if _adopt is None:
        try:
            _adopt = _find()
        except Exception as error:
            _say("engines of " + sys.executable + " are left alone: " + str(error))
            _adopt = _leave_alone
    return _adopt(_RUN, args, kwargs)


def _wrap(module):
    """Have create_engine ask before it goes on, if this is the SQLAlchemy we know."""
    original = getattr(getattr(module, "URL", None), _METHOD, None)
    if original is None:
        _say("engines are left alone: this SQLAlchemy has no URL." + _METHOD)
        return

    def instantiate_plugins(url, kwargs):
        return original(url, _arguments((url,), kwargs))

    setattr(module.URL, _METHOD, instantiate_plugins)


# -- the moment it is imported ---------------------------------------------------------


def _wrap_when_loaded(loader):
    """Have a loader wrap the module that it loads next."""

    def exec_module(module):
        del loader.exec_module
        loader.exec_module(module)
        _wrap(module)

    loader.exec_module = exec_module


class _Finder:
    """Stands first among the finders, and finds that one module with the others."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _wrap_when_loaded(spec.loader)
                return spec
        return None


def _begin():
    sys.path[:] = [entry for entry in sys.path if entry != _DIRECTORY]
    sys.path_importer_cache.pop(_DIRECTORY, None)
    if _RUN and sys.version_info >= (3, 6):
        if _MODULE in sys.modules:  # by a .pth file, say
            _wrap(sys.modules[_MODULE])
        sys.meta_path.insert(0, _Finder())
    # The one that this has hidden, with what it raises. If there is none, there has to
    # be one nevertheless: the import system takes it from here.
    this = sys.modules.pop("sitecustomize")
    try:
        __import__("sitecustomize")
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
        sys.modules["sitecustomize"] = this


if __name__ == "sitecustomize":
    _begin()
