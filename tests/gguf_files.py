"""GGUF files as converters of image models write them."""

import gguf
import numpy as np


def write_gguf(path, tensors, original_shapes=None):
    """Writes tensors by key: kind and numbers, or kind, the blocks' bytes and the shape."""
    writer = gguf.GGUFWriter(path, "lumina2")
    for key, shape in (original_shapes or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
    for key, (word, values, *shape) in tensors.items():
        kind = gguf.GGMLQuantizationType[word]
        if shape:
            data = np.frombuffer(values, np.uint8).reshape(*shape[0][:-1], -1)
        else:
            data = gguf.quants.quantize(values, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
