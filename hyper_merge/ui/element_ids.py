"""Prefixes the id of every element of the tab, so that others' styles and scripts do not apply."""

PREFIX = "hyper_merge"


def elem_id(name: str) -> str:
    """Returns the element id of a widget of the tab."""
    return f"{PREFIX}_{name}"
