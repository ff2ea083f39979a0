"""A merge on disk: folders, manifest, report, records of later fits."""
