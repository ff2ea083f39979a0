"""What the tab does with what was typed and pressed: plain values in and out."""
