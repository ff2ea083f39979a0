"""Implements one use case per module: a request in, files and a result out, without a screen."""
