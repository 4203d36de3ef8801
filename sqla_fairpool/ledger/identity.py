"""What a process is called in front of people."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["describe_process"]


def describe_process() -> Mapping[str, Any]:
    """Return host, pid, program and the time. Nothing is decided by any of them."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "program": os.path.basename(sys.argv[0]) if sys.argv else "",
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
