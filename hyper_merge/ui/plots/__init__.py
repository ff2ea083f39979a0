"""Plots of the tab."""
