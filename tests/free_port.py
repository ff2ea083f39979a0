"""A port for a test's server: no test may fail because another program listens somewhere."""

import socket

ADDRESS = "127.0.0.1"


def find_free_port():
    """Returns a port of this computer on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]
