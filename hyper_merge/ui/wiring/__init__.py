"""Connects every event of the tab, one file per panel, to its handler in `ui.handlers`."""
