"""A session of tests with a server; `test_packaging` ends it by a signal."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
from sqlalchemy import create_engine, text


def test_wait_to_be_ended(postgres_url, capfd):
    engine = create_engine(postgres_url)
    with engine.connect() as connection:
        folder = connection.scalar(text("show data_directory"))
    engine.dispose()
    server = Path(folder, "postmaster.pid").read_text().split()[0]
    with capfd.disabled():
        os.write(1, f"server {server}\n".encode())
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.write(writing, b".")
            stay()  # a child that is ended by the signal is just ended
        os.read(reading, 1)  # Python loses a signal that comes during the fork
        child = psutil.Process().children()[-1]
        child.terminate()
        os.write(1, f"child {os.waitpid(child.pid, 0)[1]}\n".encode())
        stay()


def stay():
    """Run until a handler raises; a signal just before ``signal.pause()`` is lost."""
    while True:
        time.sleep(0.1)
