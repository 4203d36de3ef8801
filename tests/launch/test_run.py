"""``sqla-fairpool run``: a script cannot tell, but that its engines share."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sqlalchemy import make_url
from support import state
from support.stub import StubServer
from support.threads import PATIENCE

import sqla_fairpool
from sqla_fairpool.cli import main, run
from sqla_fairpool.launch import RUN, VARIABLES, Run, show_place
from sqla_fairpool.ledger.addresses import database_place

LAUNCHER = [sys.executable, "-m", "sqla_fairpool", "run"]
HOOK = str(Path(sqla_fairpool.__file__).parent / "launch")

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals, fork and exec")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing of this process's settings, and a current directory of the test's."""
    for name in ("DATABASE_URL", "PYTHONPATH", "PYTHONWARNINGS", RUN, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "scripts").mkdir()
    monkeypatch.chdir(tmp_path / "scripts")


def script(source, name="script.py"):
    """Write a script into the current directory, return its name."""
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return name


def outcome(command, **how):
    """Return status, standard output and standard error of a command."""
    how = {"capture_output": True, "text": True, "timeout": PATIENCE * 2, **how}
    done = subprocess.run([*map(str, command)], **how)
    return done.returncode, done.stdout, done.stderr


def direct(*command, **how):
    return outcome([sys.executable, *command], **how)


def launched(*command, **how):
    return outcome([*LAUNCHER, *command], **how)


def both(*command, **how):
    """Run it directly and by the launcher; return what is the same of both."""
    done = direct(*command, **how)
    assert launched(*command, **how) == done
    return done


def hooked(*command, verbose=False, hook=HOOK):
    """Run it as the launcher starts it: the launcher has its own sitecustomize."""
    path = os.pathsep.join([hook, *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {RUN: told_to(verbose=verbose), "PYTHONPATH": path}
    return direct(*command, env={**os.environ, **told})


def told_to(**how):
    return Run("script", options={"ledger": None}, **how).text


# -- as if it was started directly -----------------------------------------------------

LOOK = """\
import sys
before = sorted(name for name in sys.modules if name != "sitecustomize")
import json, os
main = {k: str(v).partition(" at 0x")[0] for k, v in globals().items()}
spec = globals()["__spec__"]
print(json.dumps({
    "main": main, "spec": spec and [spec.name, spec.origin],
    "argv": sys.argv, "orig": sys.orig_argv, "path": sys.path,
    "flags": str(sys.flags), "executable": sys.executable, "cwd": os.getcwd(),
    "stdin": sys.stdin.read(), "hooks": len(sys.path_hooks),
    "cache": sorted(sys.path_importer_cache),
    "modules": before,
}, default=str))
"""


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("script.py --scraper x -v -m y -- --help --s", "script.py"),
        ("-m package.module -v --help", "package/module.py"),
        ("-m package -m x --", "package/__main__.py"),
        ("package --strict", "package/__main__.py"),
        ("./package/ -v", "package/__main__.py"),
        ("app.pyz -v", None),
        ("- -v", None),
    ],
)
def test_program_that_looks_around(tmp_path, monkeypatch, command, file):
    """Arguments, paths, what is imported, standard input: all of it is the same.

    So a script that never uses SQLAlchemy does not pay for its import, or any other.
    """
    path = f"{tmp_path}{os.pathsep}relative{os.pathsep}{tmp_path}"
    monkeypatch.setenv("PYTHONPATH", path)
    script("", "package/__init__.py")
    if file is not None:
        script(LOOK, file)
    with zipfile.ZipFile("app.pyz", "w") as archive:
        archive.writestr("__main__.py", LOOK)
    command = command.split()
    seen = both(*command, input=LOOK if command[0] == "-" else "some\nlines")[1]
    if file == "script.py":
        seen = json.loads(seen)
        assert (seen["argv"], seen["stdin"]) == (command, "some\nlines")
        assert seen["path"][0] == os.getcwd()


FAILING = """\
import atexit, sys
atexit.register(print, "last", file=sys.stderr)
atexit.register(print, "first")
print("working")
def fetch():
    {0}
fetch()
"""


@pytest.mark.parametrize(
    ("does", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('no more pages')", 1),
        ("raise ValueError('page 7')", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os._exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import nosuchmodule", 1),
        ("1 +", 1),
    ],
)
def test_ends_as_it_ends(does, status):
    """Status, order of what is printed, and every word of a traceback."""
    assert both(script(FAILING.format(does)))[0] == status


def test_script_that_does_not_exist():
    assert both("x.py")[0] == 2
    assert both("-m", "x")[0] == 1


def test_where_there_is_no_exec_it_is_waited_for(capfd):
    before = signal.getsignal(signal.SIGINT)
    for does, status in (("os._exit(7)", 7), ("os.kill(os.getpid(), 15)", 128 + 15)):
        command = ["-c", f"import os; print('x', flush=True); {does}"]
        assert run._wait([sys.executable, *command], dict(os.environ)) == status
        assert capfd.readouterr().out == "x\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_of_an_engine_are_told_as_ever():
    """Tracebacks have no line of the launcher's, but where a connection is opened."""
    source = "import sqlalchemy as sa\n"
    source += "sa.create_engine('sqlite:////nowhere/x.db').connect()\n"
    expected = direct(script(source))[2].splitlines()
    lines = launched("--ledger", "none", "script.py")[2].splitlines()
    assert (lines[:3], lines[-2:]) == (expected[:3], expected[-2:])
    for url in ("x", "postgresql+none://h/d"):
        path = script(f"import sqlalchemy as s; s.create_engine({url!r})")
        assert launched(path) == direct(path)
        assert direct(path)[0] == 1


BLANK = f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n"


@pytest.mark.parametrize(
    "first", [f"#!{sys.executable}\n", "#!/usr/bin/env python-x\n", BLANK]
)
def test_command_on_the_path(tmp_path, monkeypatch, first):
    """As the shell starts it: with its own interpreter, in the same process."""
    path = tmp_path / "bin"
    path.mkdir()
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    # Not a link to it, which would be another environment.
    (path / "python-x").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    source = f"{first}import os, sys\n{SAY_POOL}\nprint(sys.argv, os.getpid())\n"
    (path / "crawl").write_text(source)
    for program in path.iterdir():
        program.chmod(0o755)
    command = [*LAUNCHER, "crawl", "-v", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        fair, said = process.stdout
    assert "FairQueuePool" in fair
    assert said == f"{[str(path / 'crawl'), '-v', 'x']} {process.pid}\n"


def test_file_here_comes_before_a_command_which_must_be_python(tmp_path):
    script("print('here')", "ls")
    assert launched("ls") == (0, "here\n", "")
    program = shutil.which("cat")
    err = f"{program} is no Python program: name the module that it starts, by -m\n"
    status, out, said = launched("cat", "-n")
    assert (status, out, said.endswith(err)) == (2, "", True)


def test_signal_handler_of_the_script_runs():
    """The process that was started is the script's: who stops one stops the other."""
    source = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print(os.getpid(), flush=True)\n"
        "while True: time.sleep(0.1)  # a signal just before pause() would be lost\n"
    )
    started = [*LAUNCHER, script(source)]
    with subprocess.Popen(started, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == f"{process.pid}\n"
        process.terminate()
        assert process.wait(PATIENCE) == 5


# -- the hook among others -------------------------------------------------------------

SAY_POOL = "import sqlalchemy as s; print(type(s.create_engine('sqlite:///x').pool))"


@pytest.fixture
def other_hook(tmp_path, monkeypatch):
    """Write a ``sitecustomize`` that was there before."""
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    return (tmp_path / "site" / "sitecustomize.py").write_text


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("print('customized', __file__)", "sitecustomize.py\n"),
        ("import nosuchmodule", "Error in sitecustomize"),
        ("raise ImportError('x')", "Error in sitecustomize"),
        ("1 +", "Error in sitecustomize"),
        ("1 / 0", "Error in sitecustomize"),
    ],
)
def test_other_sitecustomize_runs(other_hook, does, says):
    other_hook(does)
    done = direct(script("import sys; print(sys.modules.get('sitecustomize'))"))
    assert says in done[1] + done[2]
    assert hooked("script.py") == done


def test_sqlalchemy_that_was_imported_before(other_hook):
    """By another ``sitecustomize`` or a ``.pth`` file: each copy of it changes."""
    other_hook("from sqlalchemy import create_engine")
    source = "import sitecustomize as s; print(s.create_engine('sqlite:///x').pool)"
    status, out, err = hooked(script(f"{SAY_POOL}\n{source}"))
    assert (status, out.count("FairQueuePool"), err) == (0, 2, "")
    source = f"""
import os, sys, sqlalchemy, sqlalchemy.ext.asyncio as a
from sqlalchemy import create_engine as mine
os.environ["FAIRPOOL_RUN"] = {told_to()!r}
sys.modules.pop("sitecustomize", None)
sys.path.insert(0, {HOOK!r})
import sitecustomize
assert sys.path[0] != {HOOK!r}
for create in sqlalchemy.create_engine, sqlalchemy.engine.create_engine, mine:
    print(create("sqlite:///x").pool)
print(a.create_async_engine("sqlite+aiosqlite:///x").pool)
"""
    _, out, err = direct(script(source))
    assert (out.count("FairQueuePool"), err) == (4, "")


#: A hook without which the package would be found.
NOT_INSTALLED = """\
import sys
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name == 'sqla_fairpool' and {unless!r} not in sys.path:
            raise ModuleNotFoundError('no such thing', name=name)
sys.meta_path.insert(0, NotInstalled())
"""


def test_interpreter_without_the_package_is_unharmed(other_hook):
    other_hook(NOT_INSTALLED.format(unless="never"))
    done = direct(script(f"{SAY_POOL}\nimport sys; print(sys.path)"))
    assert "QueuePool" in done[1]
    assert hooked("script.py") == done
    status, out, err = hooked("script.py", verbose=True)
    assert (status, out) == done[:2]
    (line,) = err.splitlines()
    assert line.startswith(f"sqla-fairpool run: engines of {sys.executable} are left ")
    assert line.endswith(": no such thing")


def test_package_of_a_checkout_is_found(other_hook, tmp_path):
    """Which the launcher has from its current directory, and a script has not."""
    root = tmp_path / "checkout"
    (root / "sqla_fairpool").mkdir(parents=True)
    for path in Path(HOOK).parent.iterdir():
        (root / "sqla_fairpool" / path.name).symlink_to(path)
    other_hook(NOT_INSTALLED.format(unless=str(root)))
    source = f"{SAY_POOL}\nimport sys; print({str(root)!r} in sys.path)"
    found = hooked(script(source), hook=str(root / "sqla_fairpool" / "launch"))
    assert found == (0, "<class 'sqla_fairpool.FairQueuePool'>\nFalse\n", "")


def test_hook_is_old_python():
    """Children may be of any."""
    nodes = [*ast.walk(ast.parse((Path(HOOK) / "sitecustomize.py").read_text()))]
    new = (ast.AnnAssign, ast.JoinedStr, ast.NamedExpr, ast.Nonlocal)
    for node in nodes:
        assert not isinstance(node, new)
        assert getattr(node, "annotation", getattr(node, "returns", None)) is None


def test_old_sqlalchemy_is_unharmed():
    version = "__version__ = '1.4.54'\nfrom .engine import create_engine"
    script(version, "sqlalchemy/__init__.py")
    script("from .url import create_engine", "sqlalchemy/engine/__init__.py")
    url = "class URL:\n    def _instantiate_plugins(self, kwargs): return kwargs\n"
    url += "def create_engine(**kwargs): print(URL()._instantiate_plugins(kwargs))\n"
    script(url, "sqlalchemy/engine/url.py")
    script("from sqlalchemy import create_engine as c; c(); c(x=1)")
    assert hooked("script.py") == (0, "{}\n{'x': 1}\n", "")
    err = hooked("script.py", verbose=True)[2]
    assert err.endswith(" are left alone: SQLAlchemy 1.4.54 is too old\n")
    assert err.count("left alone") == 1
    # Older or newer than we know.
    script("def create_engine(**kwargs): print(kwargs)", "sqlalchemy/engine/url.py")
    err = "sqla-fairpool run: engines are left alone: this SQLAlchemy has no "
    err += "URL._instantiate_plugins\n"
    assert hooked("script.py", verbose=True)[1:] == ("{}\n{'x': 1}\n", err)


@pytest.mark.parametrize("flag", ["-I", "-E", "-S", "-s"])
def test_isolated_children_are_unharmed(flag):
    source = "import subprocess, sys; subprocess.run([sys.executable, "
    source += f"{flag!r}, '-c', 'import sys; print(*sys.path)'], check=True)"
    done = direct(script(source))
    status, out, err = hooked("script.py")
    if flag == "-S":  # it is not taken out there
        out = out.replace(f"{HOOK} ", "")
    assert (status, out, err) == done


# -- the engines -----------------------------------------------------------------------


def test_every_way_to_an_engine():
    """And what was wrapped still looks like itself, and blames warnings on scripts."""
    source = """
import asyncio, inspect, warnings
import sqlalchemy as sa
from sqlalchemy.ext import asyncio as aio

url, async_url = sa.make_url("sqlite:///x.db"), "sqlite+aiosqlite:///x.db"
engines = [
    sa.create_engine(url),
    sa.create_engine(url=url),
    sa.engine_from_config({"sqlalchemy.url": url, "sqlalchemy.pool_size": "5"}),
    aio.create_async_engine(async_url),
    aio.async_engine_from_config({"sqlalchemy.url": async_url}),
]
for engine in engines:
    print(type(engine.pool).__name__)
pool = sa.create_pool_from_url(url)
print(type(pool).__name__)
connection = pool.connect()
print(pool.stats().tags[0].name, pool.size())
connection.close()

async def main():
    async with engines[3].connect() as connection:
        print(await connection.scalar(sa.text("select 42")))
        print(engines[3].pool.stats().tags[0].name)
    await engines[3].dispose()

asyncio.run(main())
print(sa.create_engine.__name__, sa.create_engine.__module__)
print(inspect.signature(sa.create_engine))
print(inspect.getsource(sa.create_engine).splitlines()[0])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sa.create_engine(url, implicit_returning=True)
print(caught[0].filename == __file__, len(caught))
"""
    status, out, err = launched("--pool-size", 7, script(source))
    assert (status, err) == (0, "")
    *lines, signature, first, warned = out.splitlines()
    fair, aio = "FairQueuePool", "AsyncAdaptedFairQueuePool"
    assert lines[:6] == [fair, fair, fair, aio, aio, fair]
    named = "create_engine sqlalchemy.engine.create"
    assert lines[6:] == ["script 7", "42", "script", named]
    assert "**kwargs" in signature
    assert (first, warned) == ("@util.deprecated_params(", "True 1")


CHILDREN = """
import multiprocessing, os, subprocess, sys
import sqlalchemy as sa

def show(how):
    engine = sa.create_engine(os.environ["DATABASE_URL"])
    with engine.connect() as connection:
        connection.execute(sa.text("select 1"))
        tags = [tag.name for tag in engine.pool.stats().tags]
    os.write(1, f"{how} {type(engine.pool).__name__} {tags}\\n".encode())
    engine.dispose()

if __name__ == "__main__":
    if sys.argv[1:] == ["child"]:
        show("subprocess")
        sys.exit()
    show("script")
    subprocess.run([sys.executable, __file__, "child"], check=True)
    for how in "fork", "spawn", "forkserver":
        child = multiprocessing.get_context(how).Process(target=show, args=[how])
        child.start()
        child.join()
        assert child.exitcode == 0
"""


@pytest.mark.postgres
@pytest.mark.slow
def test_children_use_the_pool_under_the_scripts_name(postgres_url):
    environment = {**os.environ, "DATABASE_URL": postgres_url}
    status, out, err = launched(script(CHILDREN), env=environment)
    assert (status, err) == (0, "")
    ways = ["script", "subprocess", "fork", "spawn", "forkserver"]
    assert out.splitlines() == [f"{way} FairQueuePool ['script']" for way in ways]


TIMES = {"statement_timeout": 7.5, "lock_timeout": "1.5"}
TIMES = json.dumps({"times*": {**TIMES, "idle_in_transaction_timeout": 60}})


@pytest.mark.postgres
@pytest.mark.parametrize("how", ["URL", "FAIRPOOL_TAGS", "--tags", "@file"])
def test_time_limits_of_a_tag_reach_the_server(postgres_url, monkeypatch, how):
    url, told = make_url(postgres_url), ["--ledger=none", "--scraper=times"]
    if how == "URL":
        keys = {"plugin": "fairpool", "fairpool_scraper": "times"}
        url = url.update_query_dict({**keys, "fairpool_tags": TIMES})
    elif how == "FAIRPOOL_TAGS":
        monkeypatch.setenv(how, TIMES)
    else:
        script(TIMES, "times.json")
        told += ["--tags", TIMES if how == "--tags" else "@times.json"]
    names = "statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"
    source = f"""
import sys
from sqlalchemy import create_engine, text
with create_engine(sys.argv[1]).connect() as connection:
    for name in {names}:
        print(connection.scalar(text(f"show {{name}}")))
"""
    url = url.render_as_string(hide_password=False)
    assert launched(*told, script(source), url) == (0, "7500ms\n1500ms\n1min\n", "")


@pytest.mark.postgres
def test_asyncio_script_on_a_real_database(postgres_url):
    url = make_url(postgres_url).set(drivername="postgresql+asyncpg")
    source = """
import asyncio, sys
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

async def main():
    engine = create_async_engine(sys.argv[1], pool_size=2)
    async def work():
        async with engine.connect() as connection:
            return await connection.scalar(text("select 1"))
    print(sum(await asyncio.gather(*(work() for _ in range(30)))))
    print(type(engine.pool).__name__, engine.pool.stats().tags[0].name)
    await engine.dispose()

asyncio.run(main())
"""
    url = url.render_as_string(hide_password=False)
    shown = show_place(database_place(make_url(postgres_url)))
    told = ["--scraper", "async", "-v", "--url", postgres_url]
    status, out, err = launched(*told, script(source), url)
    assert (status, out) == (0, "30\nAsyncAdaptedFairQueuePool async\n")
    assert [line.partition(" for ")[0] for line in err.splitlines()] == [
        "sqla-fairpool run: tag 'async',",
        f"sqla-fairpool run: 21 connections fit {shown}",
        "sqla-fairpool run: engine",
    ]
    assert "tag 'async', ledger host; pool_size=20 in place of" in err


def test_engine_with_a_pool_class_of_its_own_is_left_alone():
    source = "import sqlalchemy as s; null = s.create_engine('sqlite:///x.db', "
    source += "poolclass=s.pool.NullPool); print(null.pool.__class__)\n"
    source += "print(s.create_engine('sqlite://').pool.__class__)"
    done = both(script(source))
    status, out, err = launched("-v", "script.py")
    assert (status, out) == done[:2]
    assert err.splitlines()[1] == (
        f"sqla-fairpool run: engine for sqlite:///{os.getcwd()}/x.db left alone: "
        "it has a pool class of its own, NullPool"
    )


# -- what it is told -------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch, capsys):
    """Run the launcher up to the exec; return status, process and what was said."""

    def told(*command):
        starts = []
        monkeypatch.setattr(run, "_start", lambda *start: starts.append(start) or 0)
        status = main(["run", *map(str, command)])
        out, err = capsys.readouterr()
        assert out == ""
        assert "s3cret" not in err
        return status, (starts[0] if starts else None), err

    return told


@pytest.fixture
def environment_of(told):
    """Run the launcher up to the exec; return the script's environment."""
    return lambda *command: told(*command)[1][1]


@pytest.fixture
def refused(told):
    """Run the launcher, which does not start it; return the one line that is said."""

    def refused(*command):
        status, start, err = told(*command)
        assert (status, start, err.count("\n")) == (2, None, 1)
        return err.removeprefix("sqla-fairpool run: ")

    return refused


@pytest.mark.parametrize(
    ("command", "args", "tag"),
    [
        ("x.py", "x.py", "x"),
        ("-v a/x.py -v", "a/x.py -v", "x"),
        ("x.py -- a", "x.py -- a", "x"),
        ("x.py --scraper y --s", "x.py --scraper y --s", "x"),
        ("-- x.py -m", "x.py -m", "x"),
        ("--scraper y x.py", "x.py", "y"),
        ("-m p.mod -v -m", "-m p.mod -v -m", "p.mod"),
        ("-vm p.mod --help", "-m p.mod --help", "p.mod"),
        ("-m p.py", "-m p.py", "p.py"),
        ("app.pyz", "app.pyz", "app.pyz"),
        ("a/dir/", "a/dir/", "dir"),
        (".", ".", "scripts"),
        (".py", ".py", ".py"),
        ("-", "-", "-"),
    ],
)
def test_command_line_is_divided(told, command, args, tag):
    status, (started, environment), _ = told(*command.split())
    assert (status, started) == (0, [sys.executable, *args.split()])
    assert Run.of(environment).scraper == tag


def test_options_reach_the_script(environment_of, monkeypatch):
    options = {
        "pool_size": "8",
        "soft_limit": "4",
        "max_limit": "6",
        "idle_timeout": "5",
        "reallocation_interval": "0.5",
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    environment = environment_of("--ledger", "./x.ledger", *flags, "x.py")
    options["ledger"] = f"{os.getcwd()}/x.ledger"
    assert Run.of(environment) == Run("x", None, options)
    # Only a relative ledger is made absolute.
    for ledger in ("host", "database", "postgresql://h/d", "none"):
        options = Run.of(environment_of("--ledger", ledger, "x.py")).options
        assert options == {"ledger": None if ledger == "none" else ledger}
    monkeypatch.setenv("FAIRPOOL_LEDGER", "../x.ledger")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["a", HOOK, "", "b"]))
    environment = environment_of("x.py")
    assert environment["FAIRPOOL_LEDGER"] == os.path.abspath("../x.ledger")
    assert os.environ["FAIRPOOL_LEDGER"] == "../x.ledger"
    # The hook comes first, and once.
    assert environment["PYTHONPATH"].split(os.pathsep) == [HOOK, "a", "", "b"]


def test_database_is_told_without_user_and_password(environment_of, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "mysql+pymysql://app:s3cret@db/app")
    for url, name in (([], "app"), (["--url", "mysql://app:s3cret@db/other"], "other")):
        environment = environment_of(*url, "x.py")
        assert Run.of(environment).database == ("mysql", "db", "3306", name)
        assert "s3cret" not in environment[RUN]


def test_launcher_below_a_launcher_goes_on_with_what_that_was_told(told, monkeypatch):
    above = Run("a", ("mysql", "db", "3306", "app"), {"pool_size": "8"}, True)
    monkeypatch.setenv(RUN, above.text)
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/other")
    environment = told("--soft-limit", 3, "x.py")[1][1]
    options = {"pool_size": "8", "soft_limit": "3"}
    assert Run.of(environment) == Run("x", above.database, options, True)
    _, (_, environment), err = told("--url", "mysql://db/new", "--scraper", "y", "x.py")
    assert Run.of(environment).database == ("mysql", "db", "3306", "new")
    assert "warning" not in err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["--pool-size", "many"], "--pool-size='many' is not allowed: a whole number"),
        (["--pool-size", "0"], "--pool-size='0' is not allowed: a whole number of at"),
        (["--soft-limit", "16"], "--soft-limit='16' is not allowed: a whole number fr"),
        (["--max-limit", "-5"], "--max-limit='-5' is not allowed: a whole number from"),
        (["--idle-timeout", "nan"], "--idle-timeout='nan' is not allowed: seconds, at"),
        (["--reallocation-interval", "0"], "--reallocation-interval='0' is not allow"),
        (
            ["--tags", '{"a": {"lock_timeout": "1s"}}'],
            "--tags={'a': {'lock_timeout': '1s",
        ),
        (
            ["--tags", "@tags.json"],
            "--tags={'a': {'statement_timeout': -1}} is not allow",
        ),
        (
            ["--tags", "@none.json"],
            "--tags=@none.json cannot be read: [Errno 2] No such",
        ),
        (["--scraper", ""], "--scraper='' is not allowed: a tag is a non-empty string"),
        (["--scraper", "a\nb"], r"--scraper='a\nb' is not allowed: a tag is a non-em"),
        (["--ledger", "nonsense"], "--ledger='nonsense' is not allowed: 'host' (a fi"),
        (["--ledger", "mysql://u:s3cret@h/d"], "--ledger='mysql://...' is not allowe"),
        (["--url", "s3cret"], "--url='...' is not allowed: a database URL, like post"),
        ([f"{'x' * 200}.py"], "the script's name is no tag, so give --scraper: "),
    ],
)
def test_bad_option_is_named_and_nothing_starts(refused, command, says):
    script('{"a": {"statement_timeout": -1}}', "tags.json")
    assert refused(*command, "x.py").startswith(says)


def test_bad_variable_is_named_and_nothing_starts(refused, monkeypatch):
    for variable in (*VARIABLES, "DATABASE_URL"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "nonsense")
            assert refused("x.py").startswith(f"{variable}='")


def test_ledger_that_cannot_be_a_file_is_told_before_the_start(refused, told, tmp_path):
    path = tmp_path / "mistyped" / "app.ledger"
    assert f"{path.parent} does not exist" in refused("--ledger", str(path), "x.py")
    assert "Is a directory" in refused("--ledger", str(tmp_path), "x.py")
    (tmp_path / "app.ledger").touch()  # as an operator makes it for several users
    assert told("--ledger", str(tmp_path / "app.ledger"), "x.py")[::2] == (0, "")


def test_other_limits_than_the_ledger_in_use_has(told, tmp_path):
    """One line before the start; the script's pool has those of the ledger."""
    path = str(tmp_path / "app.ledger")
    engine = StubServer().engine(ledger=path, pool_size=20, max_overflow=10)
    same = ("--ledger", path, "--pool-size", 30)
    with engine.connect():
        status, _, said = told("--ledger", path, "--idle-timeout", 5, "x.py")
        assert (status, said) == (
            0,
            f"sqla-fairpool run: the ledger {path} is in use with --pool-size 30 "
            "--soft-limit 15 --max-limit 23 --idle-timeout 60: these limits are in "
            "force, not --pool-size 20 --soft-limit 10 --max-limit 15 "
            "--idle-timeout 5\n",
        )
        assert told(*same, "x.py")[::2] == (0, "")
    # Limits that nobody has any more bind nobody.
    engine.dispose()
    state.keeper(engine).close()
    assert told("--ledger", path, "x.py")[::2] == (0, "")


def test_what_cannot_be_started(refused, monkeypatch, capsys):
    for command, what in (([], "SCRIPT"), (["-m"], "MODULE"), (["--"], "SCRIPT")):
        assert f"{what} is missing" in refused(*command)
    for option in ("--scrap", "--nonsense"):
        with pytest.raises(SystemExit):
            main(["run", option, "x.py"])
        assert f"unrecognized arguments: {option}" in capsys.readouterr().err
    monkeypatch.undo()
    for executable, says in (
        ("/nowhere/python", "/nowhere/python cannot be started: "),
        ("", "this Python does not know its executable"),
    ):
        monkeypatch.setattr(sys, "executable", executable)
        assert main(["run", "x.py"]) == 2
        assert says in capsys.readouterr().err


# -- the server ------------------------------------------------------------------------


@pytest.mark.postgres
def test_budget_that_does_not_fit(told, refused, postgres_role, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", postgres_role("connection limit 5"))
    limited = "the role 'lim ited' may have 5 connections only, and 21 are needed"
    status, start, err = told("x.py")
    assert (status, start is None) == (0, False)
    assert err == (
        f"sqla-fairpool run: warning: {limited}; 21 connections are needed: "
        "20 of the pools, 1 to ask for sessions of lost members, one for each process; "
        "lower --pool-size, or raise the server's limit\n"
    )
    assert refused("--strict", "x.py").startswith(limited)
    assert told("--strict", "--pool-size", 4, "x.py")[::2] == (0, "")
    in_database = ["--pool-size", 4, "--ledger", "database"]
    assert "1 control connections" in told(*in_database, "x.py")[2]
    # All that is too little stands on one line.
    err = refused("--strict", "--pool-size", 5000, "x.py")
    assert err.startswith("5001 connections do not fit: max_connections is ")
    assert "; the role 'lim ited' may have 5 " in err


def test_server_that_cannot_be_asked(told, refused, tmp_path, monkeypatch):
    url = ["--url", f"postgresql+asyncpg://u:s3cret@/d?host={tmp_path}"]
    says = "whether 21 connections fit could not be checked: "
    status, start, err = told(*url, "x.py")
    assert (status, start is None, err.count("\n")) == (0, False, 1)
    assert err.startswith(f"sqla-fairpool run: warning: {says}")
    assert refused(*url, "--strict", "x.py").startswith(says)
    # The driver is not installed.
    for name in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, name, None)
    url = ["--url", "postgresql+psycopg2://h/d"]
    install = "pip install 'sqla-fairpool[postgresql]'"
    err = refused("--ledger", "database", *url, "x.py")
    assert err == f"psycopg2 is not installed: {install}\n"
    status, _, err = told(*url, "x.py")
    assert (status, err.count("\n"), install in err) == (0, 1, True)


def test_strict_needs_a_server_that_can_be_asked(told, refused):
    asks = "--strict asks a PostgreSQL server: name one by --url or DATABASE_URL"
    for url, database in (
        ([], "every database"),
        (["--url", "mysql://u:s3cret@h/d"], "mysql://h:3306/d"),
    ):
        assert asks in refused(*url, "--strict", "x.py")
        said = f"sqla-fairpool run: tag 'x', for engines of {database}\n"
        assert told("-v", *url, "x.py")[::2] == (0, said)
        assert told(*url, "x.py")[::2] == (0, "")
