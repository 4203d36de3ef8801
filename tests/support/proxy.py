"""A network that can be cut, or is slow, between clients and a server's Unix socket."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import deque

from sqlalchemy import make_url


class Proxy:
    """Forwards TCP connections to a PostgreSQL that listens to a Unix socket.

    One thread does everything: a socket that another one waits in would keep its
    connection up, so that closing it resets nothing.

    :param url: the server's, whose query says where the socket is.
    :param delay: seconds that everything needs to get through, each way.
    """

    def __init__(self, url, delay=0.0):
        self.delay = delay
        # What is on its way: when it arrives, where from, what. The oldest first.
        self._under_way = deque()
        url = make_url(url)
        self._server = f"{url.query['host']}/.s.PGSQL.{url.port or 5432}"
        self._listener = socket.create_server(("127.0.0.1", 0))
        #: The server's URL by way of this proxy.
        self.url = url.difference_update_query(["host"]).set(
            host="127.0.0.1", port=self._listener.getsockname()[1]
        )
        #: Connections that were forwarded, ever.
        self.accepted = 0
        #: Messages of clients, as they were read.
        self.messages = 0
        # From each socket to the one to which its data goes, None if it goes nowhere.
        self._peers = {}
        # Server sides whose clients were reset, which nobody hears any more, and both
        # sides of what is silent.
        self._orphans, self._silent = [], []
        self._orders = []
        self._over = False
        self._near, self._far = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    # -- orders, carried out when they return ---------------------------------------

    def reset(self):
        """Reset all clients. The server is told nothing."""
        self._order(self._reset)

    def silence(self):
        """Forward nothing any more for the connections that there are, and close none.

        Those that come later are forwarded.
        """
        self._order(self._silence)

    def notice(self):
        """Have the clients of silent connections learn of it, as by a keepalive."""
        self._order(self._notice)

    def let_go(self):
        """Have the server learn that the clients have gone which were reset."""
        self._order(self._let_go)

    def close(self):
        self._order(self._close)
        self._thread.join()

    def _order(self, order):
        done = threading.Event()
        self._orders.append((order, done))
        self._near.send(b"!")
        assert done.wait(10)

    # -- the thread -----------------------------------------------------------------

    def _run(self):
        with selectors.DefaultSelector() as self._selector:
            for sock in (self._listener, self._far):
                self._selector.register(sock, selectors.EVENT_READ)
            while not self._over:
                next_at = self._under_way[0][0] if self._under_way else None
                wait = None if next_at is None else max(next_at - time.monotonic(), 0)
                for key, _ in self._selector.select(wait):
                    self._serve(key.fileobj)
                while self._under_way and self._under_way[0][0] <= time.monotonic():
                    _, sock, data = self._under_way.popleft()
                    self._deliver(sock, data)
        for sock in (self._listener, self._near, self._far):
            sock.close()

    def _serve(self, sock):
        if sock is self._listener:
            self._accept()
        elif sock is self._far:
            self._far.recv(1)
            order, done = self._orders.pop(0)
            order()
            done.set()
        elif sock in self._peers:  # else it was closed in this round
            self._forward(sock)

    def _accept(self):
        client, _ = self._listener.accept()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._server)
        self.accepted += 1
        for sock, peer in ((client, server), (server, client)):
            self._peers[sock] = peer
            self._selector.register(sock, selectors.EVENT_READ)

    def _forward(self, sock):
        try:
            data = sock.recv(65536)
        except OSError:
            data = b""
        self.messages += bool(data) and sock.family == socket.AF_INET
        if not self.delay:
            self._deliver(sock, data)
            return
        self._under_way.append((time.monotonic() + self.delay, sock, data))
        if not data:  # or its end would be read again and again
            self._selector.unregister(sock)

    def _deliver(self, sock, data):
        if sock not in self._peers:  # it was closed, or is silent, since then
            return
        peer = self._peers[sock]
        try:
            if data and peer is not None:
                peer.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._forget(sock)
            if peer is not None:
                self._forget(peer)

    def _forget(self, sock, reset=False):
        """Close one side."""
        if sock in self._peers:
            del self._peers[sock]
            self._unwatch(sock)
        if sock in self._orphans:
            self._orphans.remove(sock)
        if reset:
            linger = b"\1\0\0\0\0\0\0\0"
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()

    def _unwatch(self, sock):
        if sock in self._selector.get_map():
            self._selector.unregister(sock)

    def _clients(self):
        return [sock for sock in self._peers if sock.family == socket.AF_INET]

    def _reset(self):
        for client in self._clients():
            server = self._peers[client]
            self._peers[server] = None
            self._orphans.append(server)
            self._forget(client, reset=True)

    def _silence(self):
        for sock in list(self._peers):
            del self._peers[sock]
            self._unwatch(sock)
            self._silent.append(sock)

    def _notice(self):
        for sock in self._silent:
            self._forget(sock, reset=sock.family == socket.AF_INET)
        self._silent = []

    def _let_go(self):
        for server in list(self._orphans):
            self._forget(server)

    def _close(self):
        for sock in list(self._peers):
            self._forget(sock)
        self._notice()
        self._over = True
