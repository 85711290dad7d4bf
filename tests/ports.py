"""Ports for programs that are started by a test and listen later."""

import random
import socket


# Below the ports that systems give to whoever asks for any, such as other tests' servers: one of those could be taken
# before the program that was told it has started.
PORTS = range(20_000, 30_000)


def free_port() -> int:
    """A free port on the loopback interface."""
    while True:
        port = random.SystemRandom().choice(PORTS)  # tests on other workers have the same seed
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
