"""Builds the tab: panels, handlers, plots and their wiring; knows hosts by their protocol alone."""
