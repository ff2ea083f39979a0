"""The WebUIs by whose pins the tests run, if it is some's."""

from importlib.metadata import PackageNotFoundError, version


def _gradio() -> str | None:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None


HOSTS_BY_GRADIO = {"3.41.2": {"a1111", "reforge", "classic"}, "4.40.0": {"forge", "neo"}}
PINNED_HOSTS = HOSTS_BY_GRADIO.get(_gradio(), set())


def is_of_another_host(item) -> bool:
    """Tells whether a test plays a WebUI of another gradio than the one at hand.

    By our own pins each is played; by a WebUI's, what its gradio does to the others proves nothing.
    """
    parameters = getattr(item, "callspec", None)
    if not PINNED_HOSTS or parameters is None:
        return False
    played = {parameters.params.get(name) for name in ("flavour", "some_host")}
    return bool(played & set().union(*HOSTS_BY_GRADIO.values()) - PINNED_HOSTS)
