"""The WebUI by whose pins the tests run, if it is one's."""

from importlib.metadata import PackageNotFoundError, version


def _gradio() -> str | None:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None


PINNED_HOST = {"3.41.2": "a1111", "4.40.0": "forge"}.get(_gradio())
EVERY_HOST = ("a1111", "forge", "neo", "reforge", "classic")


def is_of_another_host(item) -> bool:
    """Tells whether a test plays a WebUI that has not the pins of the one at hand.

    By our own pins each is played; by a WebUI's, what its gradio does to the others proves nothing.
    """
    parameters = getattr(item, "callspec", None)
    if PINNED_HOST is None or parameters is None:
        return False
    played = {parameters.params.get(name) for name in ("flavour", "some_host")}
    return bool(played & set(EVERY_HOST) - {PINNED_HOST})
