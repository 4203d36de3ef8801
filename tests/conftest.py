from __future__ import annotations

import gc
import getpass
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile

import pytest
from hypothesis import HealthCheck, Phase, settings
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool
from support.state import assert_quiet
from support.stub import StubServer, sized
from support.threads import VirtualClock, eventually
from support.worlds import make_world

from sqla_fairpool import FairQueuePool
from sqla_fairpool.demo import EmbeddedServer
from sqla_fairpool.ledger import addresses

settings.register_profile(
    "dev", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True)
# For mutants: to notice one is enough.
settings.register_profile(
    "mutants",
    settings.get_profile("ci"),
    database=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],
)
settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
)


def pytest_configure():
    """Have SIGTERM end the session as Ctrl-C does, so that no server is left behind."""
    session = os.getpid()

    def end(number, frame):
        if os.getpid() == session:
            raise KeyboardInterrupt("SIGTERM")
        signal.signal(number, signal.SIG_DFL)  # a forked child
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)


@pytest.fixture
def temp(tmp_path, monkeypatch):
    """Directories of default ledgers are in one of the test's own, in this process."""
    path = tmp_path / "temp"
    path.mkdir()
    monkeypatch.setattr(addresses, "_TEMP", path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _default_ledgers_removed(tmp_path_factory):
    """Remove what other processes have left at default places in this session."""
    yield
    _remove_default_ledgers(tmp_path_factory.getbasetemp())


def _remove_default_ledgers(folder):
    """Remove the default ledgers of databases below a folder."""
    name = re.sub(r"[^\w.]+", "_", str(folder))
    for path in addresses.known_ledgers():
        if name in path.name:
            for left in path.parent.glob(f"{path.name}*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@pytest.fixture
def light_heap():
    """Let collections look at what the test has made, not at all that others left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_log():
    """Have pytest keep no tracebacks: in their frames are connections."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def server():
    """A stub DBAPI."""
    return StubServer()


@pytest.fixture
def make_pool(server):
    """Make pools on the stub; each must be quiet when the test ends.

    With a size as its argument, all connections may be those of one tag.
    """
    pools = []

    def make(size=None, **options):
        pools.append(server.pool(**sized(size, options)))
        return pools[-1]

    yield make
    for pool in pools:
        assert_quiet(pool)


@pytest.fixture
def make_engine(server):
    """Make engines on the stub, as `make_pool` makes pools."""
    engines = []

    def make(size=None, **options):
        engines.append(server.engine(**sized(size, options)))
        return engines[-1]

    yield make
    for engine in engines:
        assert_quiet(engine.pool)


@pytest.fixture(params=["asyncio", "uvloop"])
def tasks(request):
    """A world of tasks: see `support.worlds`."""
    return make_world(request.param)


@pytest.fixture(params=["threads", "asyncio", "uvloop"])
def world(request):
    """A world of threads or of tasks: see `support.worlds`."""
    return make_world(request.param)


@pytest.fixture
def clock(monkeypatch):
    """A virtual clock in every pool made in the test."""
    clock = VirtualClock()
    monkeypatch.setattr(FairQueuePool, "_clock", staticmethod(clock))
    return clock


@pytest.fixture(scope="session")
def postgres_url():
    """The URL of a real PostgreSQL, started for this session."""
    server = EmbeddedServer()
    try:
        server.start()
        yield server.url
    finally:
        server.stop()
        _remove_default_ledgers(server.folder)


@pytest.fixture
def postgres_role(postgres_url):
    """Make roles that may log in; return the URL of one, with a password, as text."""
    engine = create_engine(
        postgres_url, poolclass=NullPool, isolation_level="AUTOCOMMIT"
    )
    made = []

    def make(options="", name="lim ited"):
        with engine.connect() as connection:
            connection.execute(text(f'create role "{name}" login {options}'))
        made.append(name)
        url = make_url(postgres_url).set(username=name, password="s3cret")
        return url.render_as_string(hide_password=False)

    yield make
    with engine.connect() as connection:
        for name in made:
            connection.execute(text(f'drop role "{name}"'))


@pytest.fixture(scope="session")
def mariadb_url(tmp_path_factory):
    """The URL of a real MariaDB, where one is installed."""
    if not (shutil.which("mariadbd") and shutil.which("mariadb-install-db")):
        pytest.skip("no MariaDB server is installed (mariadbd is not on the PATH)")
    folder = tempfile.mkdtemp(prefix="fairpool-maria-")
    data, socket = f"{folder}/data", f"{folder}/socket"
    options = ["--no-defaults", f"--datadir={data}", f"--user={getpass.getuser()}"]
    install = [
        "mariadb-install-db",
        *options,
        "--auth-root-authentication-method=normal",
    ]
    subprocess.run(install, check=True, capture_output=True)
    server = subprocess.Popen(
        ["mariadbd", *options, f"--socket={socket}", "--skip-networking"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        eventually(lambda: os.path.exists(socket), "MariaDB's socket")
        yield f"mysql+pymysql://root@localhost/test?unix_socket={socket}"
    finally:
        server.terminate()
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)
