"""One prefix for every element of the tab, so that styles and scripts of others do not apply."""

PREFIX = "hyper_merge"


def elem_id(name: str) -> str:
    """Returns the element id of a widget of the tab."""
    return f"{PREFIX}_{name}"
