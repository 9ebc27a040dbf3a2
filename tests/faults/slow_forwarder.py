"""Forwards TCP connections of this machine and delays the bytes of each direction, like a network with a high latency."""

import queue
import socket
import threading
import time


class SlowForwarder:
    """Forwards each connection to the port `target`. `delay` is the delay of each direction in seconds."""

    def __init__(self, target):
        self.target, self.delay = target, 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        start_thread(self._accept)

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forward(client, server)
            self._forward(server, client)

    def _forward(self, source, target):
        chunks = queue.SimpleQueue()

        def read():
            try:
                while chunk := source.recv(65_536):
                    chunks.put((time.monotonic() + self.delay, chunk))
            except OSError:
                pass
            chunks.put((time.monotonic() + self.delay, b""))

        def write():
            try:
                while True:
                    due, chunk = chunks.get()
                    time.sleep(max(0.0, due - time.monotonic()))
                    if not chunk:
                        break
                    target.sendall(chunk)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        start_thread(read)
        start_thread(write)


def start_thread(function):
    threading.Thread(target=function, daemon=True).start()
