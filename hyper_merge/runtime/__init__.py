"""What a long job needs of the process and the machine."""
