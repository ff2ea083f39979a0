"""Every event of the tab, one file per panel; `ui.handlers` says what is done on an event."""
