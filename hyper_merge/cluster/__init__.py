"""Reaches other processes and machines through dask.distributed, an extra."""
