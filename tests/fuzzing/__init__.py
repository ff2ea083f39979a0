"""Hostile files: damage done to valid samples, and what of the package must read them.

The contract: a reader returns, or refuses with a `HyperMergeError`; anything else is a fault.
"""
