"""One prefix for every element of the tab, so that no style or script meets another's."""

PREFIX = "hyper_merge"


def elem_id(name: str) -> str:
    """The element id of a widget of the tab."""
    return f"{PREFIX}_{name}"
