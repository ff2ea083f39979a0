"""Draws the plots of the tab."""
