"""Every event of the tab, a file for each panel; what is done on an event is in the handlers of `ui`."""
