"""Contains the mathematics: tensors in, tensors out, no files and no devices of its own."""
