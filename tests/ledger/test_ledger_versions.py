"""A member of today and one of the version before on one ledger.

The version before is built from the history of the repository, at the last commit whose
rows are those of protocol version 2.
"""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import state
from support.stub import StubServer
from support.threads import PATIENCE

from sqla_fairpool import TagLimits
from sqla_fairpool.cli import main
from sqla_fairpool.ledger.store import LedgerError

TESTS = Path(__file__).parent.parent
BEFORE = "919f852d5e5f84a65d0a4f219b973a78b3167360"

#: What members have to hear of.
COMMANDS = (["set", "pool_size=9"], ["pause"])

#: Prints what becomes of a checkout, and holds the connection until it is told to end.
MEMBER = """
import sys
from support.stub import StubServer
engine = StubServer().engine(ledger=sys.argv[1])
try:
    connection = engine.connect()
    print("connected")
except Exception as error:
    print(type(error).__name__, error)
sys.stdout.flush()
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """The directory of the version before."""
    folder = tmp_path_factory.mktemp("older")
    command = ["git", "-C", TESTS.parent, "archive", BEFORE, "sqla_fairpool"]
    archive = subprocess.run(command, capture_output=True)
    if archive.returncode:
        pytest.skip("the repository's history is not here: a shallow clone, an archive")
    subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
    return folder


@pytest.fixture
def old_member(older, tmp_path):
    """Have a process of the version before check out; what it says."""

    @contextmanager
    def member():
        process = subprocess.Popen(
            [sys.executable, "-c", MEMBER, tmp_path / "ledger"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "ignore"},
            cwd=older,  # where Python looks first
        )
        with process:
            yield process.stdout.readline()
            process.stdin.close()
            assert process.wait(PATIENCE) == 0

    return member


@pytest.fixture
def engine(tmp_path):
    """A member of today, once it is used."""
    engine = StubServer().engine(
        ledger=str(tmp_path / "ledger"), tags={"api": TagLimits(max=2)}
    )
    yield engine
    engine.dispose()
    state.keeper(engine).close()


def test_member_of_today_waits_for_the_end_of_those_before(
    engine, old_member, tmp_path, capsys
):
    """It is told so in one line, and a command that they would not obey as well."""
    said = "an older version of sqla_fairpool uses the ledger (protocol version 2, here"
    with old_member() as connected:
        assert connected == "connected\n"
        with pytest.raises(LedgerError, match=re.escape(said)):
            engine.connect()
        for command in COMMANDS:
            assert main(["ledger", *command, "--ledger", f"{tmp_path}/ledger"]) == 2
            err = capsys.readouterr().err
            assert said in err and err.count("\n") == 1
    engine.connect().close()


def test_member_of_the_version_before_is_refused_by_those_of_today(engine, old_member):
    """It would lose what it does not know: the limits of tags, say."""
    engine.connect().close()
    with old_member() as said:
        assert said.startswith("LedgerError the ledger is of protocol version 3, and ")
        assert "it runs an older sqla_fairpool than another member" in said
    engine.connect().close()
