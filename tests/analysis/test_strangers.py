"""Checkpoints that have nothing but their keys in common are named."""

import torch
from narrow_layouts import NARROW
from random_checkpoints import files, state
from tiny_family import WarningLog, merge


def test_networks_that_share_no_more_than_their_keys_are_named(tmp_path):
    shapes = NARROW["z_image"]()
    tuned = [state(shapes, seed) for seed in (1, 2, 3)]
    generator = torch.Generator().manual_seed(99)
    other = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    paths = files(tmp_path, *tuned, other)
    (told,) = warnings_of(paths, tmp_path / "four")
    assert told.startswith(f"{paths[3].name} differs from the average by ")
    assert not warnings_of(paths[:3], tmp_path / "three")
    assert len(warnings_of(paths[2:], tmp_path / "two")) == 2, "neither is nearer to the average"


def warnings_of(paths, folder):
    log = WarningLog()
    merge(paths, folder, log.progress, ranks=(2,), iterations=1)
    return [text for text in log.warnings if "differs from the average" in text]
