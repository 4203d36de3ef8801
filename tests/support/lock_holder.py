"""Holds the lock of a ledger's store until it is killed: lock_holder.py LEDGER."""

from __future__ import annotations

import sys
import threading

from sqla_fairpool.ledger.addresses import make_store

store = make_store(sys.argv[1], None)
store.open()
with store.transaction():
    print("locked", flush=True)
    threading.Event().wait()
