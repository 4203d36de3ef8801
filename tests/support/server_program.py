"""A session of tests with a server; `test_packaging` ends it by a signal."""

from __future__ import annotations

import os
import signal
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
        if os.fork() == 0:
            signal.pause()  # a child that is ended by the signal is just ended
        child = psutil.Process().children()[-1]
        child.terminate()
        os.write(1, f"child {os.waitpid(child.pid, 0)[1]}\n".encode())
        signal.pause()
