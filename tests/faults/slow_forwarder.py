"""Forwards TCP connections to a port of this machine and delays the bytes of each direction. `replicas.py` simulates a
network with a high latency to Redis with it."""

import queue
import socket
import threading
import time


class SlowForwarder:
    """Forwards each connection to the port `target_port`. `delay` is the delay of each direction in seconds. A change
    of `delay` also applies to open connections."""

    def __init__(self, target_port):
        self.target_port, self.delay = target_port, 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        start_thread(self._accept)

    def _accept(self):
        while True:
            client, _ = self._listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port))
            except OSError:
                client.close()
                continue
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._forward(client, server)
            self._forward(server, client)

    def _forward(self, source, target):
        """Forwards the bytes of one direction. One thread receives them, and another one sends them when they are due.
        """
        chunks = queue.SimpleQueue()

        def receive_chunks():
            try:
                while chunk := source.recv(65_536):
                    chunks.put((time.monotonic() + self.delay, chunk))
            except OSError:
                pass
            chunks.put((time.monotonic() + self.delay, b""))

        def send_chunks():
            try:
                while True:
                    due_at, chunk = chunks.get()
                    time.sleep(max(0.0, due_at - time.monotonic()))
                    if not chunk:
                        break
                    target.sendall(chunk)
                target.shutdown(socket.SHUT_WR)
            except OSError:
                pass

        start_thread(receive_chunks)
        start_thread(send_chunks)


def start_thread(function):
    """Runs a function on a daemon thread, which does not keep the program running."""
    threading.Thread(target=function, daemon=True).start()
