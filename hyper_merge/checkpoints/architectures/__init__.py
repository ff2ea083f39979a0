"""What a checkpoint is: family, layout, names of its modules."""
