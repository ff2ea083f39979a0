"""Formats the texts of the tab as HTML: one file per screen, `format_*` functions of plain values."""
