"""Reads and writes a merge's record on disk: folders, manifest, report, records of later fits."""
