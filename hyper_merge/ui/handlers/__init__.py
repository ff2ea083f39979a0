"""Answers the events of the tab by functions, called handlers, with plain values in and out."""
