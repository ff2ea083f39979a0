"""Handlers: functions that answer the events of the tab, with plain values in and out."""
