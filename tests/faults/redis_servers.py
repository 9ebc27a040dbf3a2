"""Starts the Redis servers and the Redis Sentinel processes of `replicas.py`. Kills, restarts, stops and flushes a
server, and causes a failover to its replica."""

import os
import signal
import socket

from processes import redis_answers, wait_until

MASTER_NAME = "keychoir"
SENTINEL_COUNT = 3


def execute_command(port, command):
    """Sends a command to the Redis server on `port`. Returns the beginning of the reply."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f"{command}\r\n".encode())
        return connection.recv(65_536).decode()


def is_ready(_, port):
    """Returns whether the Redis server on `port` responds. The first argument is its process and is not used."""
    return redis_answers(socket.AF_INET, ("127.0.0.1", port))


class RedisServer:
    """A `redis-server` that writes no data to the disk."""

    def __init__(self, processes, *options):
        self._processes, self._options = processes, options
        self.process, self.port = processes.start_on_free_port(self._start, is_ready)

    def _start(self, port):
        arguments = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
        arguments += ["--dir", self._processes.directory, "--repl-diskless-sync-delay", "0"]
        return self._processes.start("redis", [*arguments, *self._options])

    def kill(self):
        self.process.kill()

    def restart(self):
        """Starts the killed server on the same port, without its data."""
        self.process = self._start(self.port)
        wait_until("a response of the Redis server", lambda: is_ready(self.process, self.port))

    def stop(self):
        """Stops the process with SIGSTOP. Its connections stay open, and it sends no responses."""
        self.process.child.send_signal(signal.SIGSTOP)

    def resume(self):
        self.process.child.send_signal(signal.SIGCONT)

    def flush(self):
        execute_command(self.port, "FLUSHALL")


class Sentinels:
    """A Redis master, its replica, and Redis Sentinel processes that promote the replica when the master is lost."""

    def __init__(self, processes):
        self.master = RedisServer(processes)
        self.replica = RedisServer(processes, "--replicaof", f"127.0.0.1 {self.master.port}")
        is_connected = lambda: "master_link_status:up" in execute_command(self.replica.port, "INFO replication")
        wait_until("the Redis replica to connect", is_connected)
        self._ports = [self._start_sentinel(processes, number) for number in range(SENTINEL_COUNT)]
        addresses = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        self.url = f"redis+sentinel://{addresses}/{MASTER_NAME}"
        other_sentinels = f"num-other-sentinels\r\n$1\r\n{SENTINEL_COUNT - 1}"

        def is_complete(port):
            fields = execute_command(port, f"SENTINEL MASTER {MASTER_NAME}")
            return other_sentinels in fields and "num-slaves\r\n$1\r\n1" in fields

        wait_until("the sentinels to find all servers", lambda: all(map(is_complete, self._ports)))

    def _start_sentinel(self, processes, number):
        """Starts a sentinel and returns its port."""
        directory = processes.path(f"sentinel-{number}")
        os.mkdir(directory)
        config = os.path.join(directory, "sentinel.conf")
        # A master counts as lost if two of the three sentinels have received no response for 300 ms.
        with open(config, "w") as file:
            file.write(f"bind 127.0.0.1\ndir {directory}\n")
            file.write(f"sentinel monitor {MASTER_NAME} 127.0.0.1 {self.master.port} 2\n")
            file.write(f"sentinel down-after-milliseconds {MASTER_NAME} 300\n")
            file.write(f"sentinel failover-timeout {MASTER_NAME} 1000\n")
        start = lambda port: processes.start("sentinel", ["redis-sentinel", config, "--port", str(port)])
        return processes.start_on_free_port(start, is_ready)[1]

    def fail_over(self):
        """Kills the master and waits until all sentinels report the replica as the new master."""
        self.master.kill()
        command = f"SENTINEL GET-MASTER-ADDR-BY-NAME {MASTER_NAME}"
        reports_replica = lambda port: str(self.replica.port) in execute_command(port, command)
        wait_until("the sentinels to report the new master", lambda: all(map(reports_replica, self._ports)))
