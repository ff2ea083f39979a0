"""The widgets of the tab, a file for each panel; what happens on a click is wired in `ui.wiring`.

A panel is a frozen dataclass of widgets with the function that builds it. A new one is a new file
here, a file of its handlers in `ui`, one of its events in `ui.wiring`, and a line in `ui.tab`.
"""
