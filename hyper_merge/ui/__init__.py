"""The tab: panels, handlers, plots, and all wiring in one place."""
