"""The recipe of a merge: its settings, their parsers, and files that hold them."""
