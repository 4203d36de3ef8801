"""A server that counts its connections exactly, and a scraper that opens them.

As a program: counting_server.py PORT LEDGER NAME THREADS works until its standard input
ends. What it opens is a socket and no more.
"""

from __future__ import annotations

import selectors
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor


class CountingServer:
    """Accepts and closes; :attr:`most` is the most that were open at any instant.

    Of what the kernel reports at once, the ends are counted first: an end that came
    before an arrival has been there when the arrival was reported.
    """

    def __init__(self):
        self.open = self.most = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while not self._over.is_set():
            ready = [key.fileobj for key, _ in self._selector.select(0.1)]
            for client in ready:
                if client is not self._listener and not self._received(client):
                    self._selector.unregister(client)
                    client.close()
                    self.open -= 1
            if self._listener in ready:
                client, _ = self._listener.accept()
                self._selector.register(client, selectors.EVENT_READ)
                self.open += 1
                self.most = max(self.most, self.open)

    @staticmethod
    def _received(client):
        try:
            return client.recv(100)
        except OSError:
            return b""

    def close(self):
        self._over.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()


def main(port, ledger, name, number):
    sys.path.insert(0, __file__.rpartition("/support/")[0])
    from support.stub import StubConnection, StubServer

    class Connection(StubConnection):
        def __init__(self, *args):
            self.socket = socket.create_connection(("127.0.0.1", int(port)))
            super().__init__(*args)

        def close(self):
            self.socket.close()
            self.closed = True

        def __del__(self):
            self.socket.close()

    stub = StubServer()
    stub.connect = lambda: Connection(stub, 0)
    engine = stub.engine(ledger=ledger, idle_timeout=1.0, reallocation_interval=0.3)
    tagged = engine.execution_options(scraper=name)
    over = threading.Event()

    def work(_):
        while not over.is_set():
            with tagged.connect():
                over.wait(0.01)

    with tagged.connect():
        print("working", flush=True)
    with ThreadPoolExecutor(int(number)) as threads:
        done = threads.map(work, range(int(number)))
        sys.stdin.read()
        over.set()
    assert len([*done]) == int(number)


if __name__ == "__main__":
    main(*sys.argv[1:])
