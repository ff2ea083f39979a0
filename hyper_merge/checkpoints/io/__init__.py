"""Files of tensors: headers, reading and writing, whole or not at all."""
