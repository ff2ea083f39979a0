"""The yardstick: read the files, mean in float32, write the average in fp16, in plain torch.

python benchmarks/plain_job.py OUTPUT FILE FILE ...
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def main(output: Path, paths: list[str]) -> None:
    """Averages the files in the shortest way that keeps one tensor of each in memory."""
    files = [safe_open(path, framework="pt") for path in paths]
    average = {}
    for key in files[0].keys():  # noqa: SIM118 - not a mapping
        tensors = [file.get_tensor(key) for file in files]
        if tensors[0].is_floating_point():
            mean = torch.stack([tensor.float() for tensor in tensors]).mean(0)
            average[key] = mean.half()
        else:
            average[key] = tensors[0]
    save_file(average, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
