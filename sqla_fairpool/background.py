"""How a thread that works in the background is started, from any caller's thread.

``Thread.start()`` returns when the new thread runs. In CPython 3.10 and 3.11 an
exception that is thrown into the starting thread (``PyThreadState_SetAsyncExc``) may
hit the new one instead, before its first instruction. That one ends, and the wait for
it does not. So a helper is started here first, and another one if it is not heard of.
No thread but the helper calls ``Thread.start()``, and none knows its number.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable

#: Seconds that are waited for a sign of a helper: the system has to start a thread.
_HEARD_WITHIN = 1.0

#: How many helpers are tried. None is heard of while the interpreter ends.
_HELPERS = 3


def start_thread(
    target: Callable[[], object], name: str, failed: Callable[[], object] = lambda: None
) -> None:
    """Start a daemon thread, once.

    An interrupt is raised when it has been started. If several come, it may not be.

    :param failed: called, from this thread or another one, if it cannot be started: at
      the interpreter's end, or if the system has no more threads.
    """
    heard, done = threading.Event(), threading.Event()
    order = threading.Lock()  # which is never released: one thread gets it

    def help_out() -> None:
        heard.set()  # first: the caller may hold a lock that is needed below
        if order.acquire(blocking=False):
            try:
                threading.Thread(target=target, name=name, daemon=True).start()
            except RuntimeError:
                failed()
            done.set()

    interrupt = None
    for _ in range(_HELPERS):
        try:
            _thread.start_new_thread(help_out, ())
            if heard.wait(_HEARD_WITHIN):
                done.wait(_HEARD_WITHIN)
                break
        except RuntimeError:
            break
        except BaseException as error:
            interrupt = error
    if not heard.is_set() and order.acquire(blocking=False):
        failed()
    if interrupt is not None:
        raise interrupt
