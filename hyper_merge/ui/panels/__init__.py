"""Builds the widgets of the tab, one file per panel; `ui.wiring` connects their events.

A panel is a frozen dataclass of widgets with the function that builds it. A new panel needs a file
here, a file of its handlers in `ui.handlers`, one of its events in `ui.wiring`, and a line in `ui.tab`.
"""
