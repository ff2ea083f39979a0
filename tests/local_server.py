"""Servers of tests: neither a taken port nor a busy machine may end them."""

import socket

ADDRESS = "127.0.0.1"


def find_free_port():
    """Returns a port of this computer on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


def skip_self_check(patch):
    """Lets gradio start a server without asking for its page, which it gives up after seconds.

    Args:
        patch: a pytest.MonkeyPatch, which undoes it.
    """
    patch.setattr("gradio.networking.url_ok", lambda url: True)
