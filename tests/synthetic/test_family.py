"""Made-up families of other architectures are whole checkpoints of them."""

from dataclasses import replace

import pytest
import torch
from narrow_layouts import NARROW
from safetensors.torch import load_file

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.prediction_type import with_prediction_type
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.synthetic import writer
from hyper_merge.synthetic.writer import FamilySpec, write_family

SMALL = replace(writer.NARROW, count=2, width=16, context=24, vocabulary=20, vae_width=4, terms=4)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("sd2", replace(SMALL, architecture="sd2")),
        ("sdxl", replace(SMALL, architecture="sdxl", context=8, second_context=16)),
    ],
)
def test_a_synthetic_family_is_detected_as_itself(tmp_path, name, spec):
    paths = write_family(tmp_path, spec)
    header = read_header(paths[0])
    assert with_prediction_type(header, require_supported(header)).name == name
    first, second = (load_file(path) for path in paths)
    assert {key: tuple(tensor.shape) for key, tensor in first.items()} == NARROW[name]()
    for key, tensor in first.items():
        assert bool(tensor.isfinite().all()), key
        same = key.startswith("first_stage_model.") or key.endswith("position_ids")
        assert torch.equal(tensor, second[key]) == same, key


def test_the_defaults_are_the_real_sizes_of_sdxl_too():
    assert FamilySpec(architecture="sdxl").second_context == 1280
