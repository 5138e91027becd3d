"""A port for a server in a process of its own, which cannot be asked to take any."""

import random
import socket

ANY = random.SystemRandom()  # the tests' own numbers are the same in every process


def free_port() -> int:
    """One that nobody has, below those that systems give to clients: seconds go by until the server takes it."""
    while True:
        port = ANY.randrange(10_000, 32_000)
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
