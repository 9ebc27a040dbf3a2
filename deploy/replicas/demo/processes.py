"""Starts programs in a temporary directory, also on free ports, waits for their output and for other conditions, and
kills all of them when this program exits."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

START_TIMEOUT_SECONDS = 30
END_TIMEOUT_SECONDS = 60
POLL_SECONDS = 0.01
# Linux assigns ports from 32768 on to clients and to listeners on port 0, so it assigns none of these ports.
PORTS = range(20_000, 32_000)
MAX_START_ATTEMPTS = 50


class Failure(Exception):
    """A step failed. The message describes the step and the reason."""


def wait_until(event, condition, timeout=START_TIMEOUT_SECONDS):
    """Polls `condition` until it returns a true value, and returns this value. `event` describes the awaited event."""
    deadline = time.monotonic() + timeout
    while not (outcome := condition()):
        if time.monotonic() > deadline:
            raise Failure(f"timed out after {timeout} s while waiting for {event}")
        time.sleep(POLL_SECONDS)
    return outcome


def end_with_parent():
    """Makes the kernel kill the calling process when its parent exits. This is possible only on Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        set_parent_death_signal = 1
        prctl(set_parent_death_signal, signal.SIGKILL)


class Process:
    """A started program, whose output is written to a file."""

    def __init__(self, name, arguments, output, environment=None, pass_fds=()):
        self.name, self.output = name, output
        try:
            with open(output, "wb") as file:
                self.child = subprocess.Popen(
                    arguments,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=pass_fds,
                    preexec_fn=end_with_parent,
                )
        except FileNotFoundError:
            raise Failure(f"{arguments[0]} is not installed") from None

    def read_output(self):
        """Returns the output so far."""
        with open(self.output, encoding="utf-8", errors="replace") as file:
            return file.read()

    def has_exited(self):
        return self.child.poll() is not None

    def wait_for_output(self, pattern):
        """Waits until the output matches a compiled pattern. Returns the first group of the match."""

        def find_match():
            match = pattern.search(self.read_output())
            if not match and self.has_exited():
                raise Failure(f"{self.name} exited:\n{self.read_output()}")
            return match

        return wait_until(f"the output {pattern.pattern} of {self.name}", find_match).group(1)

    def kill(self):
        """Sends SIGKILL and waits for the end."""
        self.child.kill()
        self.child.wait(END_TIMEOUT_SECONDS)

    def end(self):
        """Sends SIGTERM and waits for the end. Returns the exit code."""
        self.child.send_signal(signal.SIGCONT)
        self.child.terminate()
        try:
            return self.child.wait(END_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failure(f"{self.name} did not exit within {END_TIMEOUT_SECONDS} seconds") from None


class Processes:
    """A temporary directory and the programs that were started in it. Leaving the context kills the programs that still
    run and removes the directory. SIGTERM and SIGHUP end this program through the same cleanup."""

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        self._directory = tempfile.TemporaryDirectory(prefix="keychoir-replicas-")
        self.directory = self._directory.name
        self._started = []
        return self

    def __exit__(self, *_):
        for process in reversed(self._started):
            if not process.has_exited():
                process.kill()
        self._directory.cleanup()

    def path(self, *names):
        return os.path.join(self.directory, *names)

    def start(self, name, arguments, environment=None, pass_fds=()):
        """Starts a program with the variables `environment` in addition to `PATH`. Returns the process."""
        # Debian installs HAProxy in a directory that is not in the `PATH` of users.
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
        environment = {"PATH": path, **(environment or {})}
        output = self.path(f"{name}-{len(self._started)}.log")
        process = Process(name, arguments, output, environment, pass_fds)
        self._started.append(process)
        return process

    def start_on_free_port(self, start, is_ready):
        """Calls `start` with random ports until one of the programs becomes ready. Returns the process and its port."""
        for _ in range(MAX_START_ATTEMPTS):
            port = random.choice(PORTS)
            process = start(port)
            wait_until(f"the readiness of {process.name}", lambda: is_ready(process, port) or process.has_exited())
            if not process.has_exited():
                return process, port
            if "in use" not in process.read_output():
                raise Failure(f"{process.name} exited:\n{process.read_output()}")
        raise Failure(f"{process.name} found no free port in {MAX_START_ATTEMPTS} attempts")


def redis_answers(family, address):
    """Returns whether a Redis server at `address` executes commands."""
    try:
        with socket.socket(family) as connection:
            connection.settimeout(1)
            connection.connect(address)
            connection.sendall(b"PING\r\n")
            return connection.recv(100).startswith(b"+PONG")
    except OSError:
        return False
