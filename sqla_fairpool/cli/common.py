"""What the sub-commands have in common: exit codes, and the error that ends one."""

from __future__ import annotations

from ..options import hide_passwords

__all__ = [
    "EXIT_CANNOT_RUN",
    "EXIT_NOT_AS_EXPECTED",
    "EXIT_OK",
    "EXIT_SIGNAL",
    "CommandError",
    "hide_passwords",
]

#: Everything came out as it should.
EXIT_OK = 0
#: The command ran, and something did not come out as expected.
EXIT_NOT_AS_EXPECTED = 1
#: The command could not run: bad arguments (argparse uses the same number),
#: something that is not installed, a server that cannot be reached.
EXIT_CANNOT_RUN = 2
#: Plus the number of the signal that ended it, as shells count: 130 for Ctrl-C.
EXIT_SIGNAL = 128


class CommandError(Exception):
    """A command cannot do its work; the text, on one line, says why.

    :param status: what the program exits with.
    """

    def __init__(self, text: str, status: int = EXIT_CANNOT_RUN) -> None:
        super().__init__(text)
        self.status = status
