"""The prediction type of checkpoints, in their average and in its configuration file."""

import pytest
import torch
import yaml
from narrow_layouts import few, two, xl
from random_checkpoints import (
    SPREAD,
    files,
    merged_exactly,
    metadata,
    state,
)
from safetensors.torch import load_file
from tiny_family import merge

from hyper_merge.errors import MismatchError


def predicting(shapes, seed, spread):
    """A checkpoint whose telling tensor spreads so far."""
    tensors = state(shapes, seed, dtype=torch.float16)
    values = torch.linspace(-1, 1, tensors[SPREAD].numel())
    return {**tensors, SPREAD: (values * spread / values.std()).half()}


def test_v_prediction_average_has_a_configuration(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.12) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    config = merged.place.hyper_model.with_suffix(".yaml")
    params = yaml.safe_load(config.read_text())["model"]["params"]
    assert params["parameterization"] == "v"
    assert params["unet_config"]["params"]["context_dim"] == 1024
    entries = metadata(merged.loras[0])
    assert entries["ss_base_model_version"] == "sd_v2_v"
    assert entries["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (entries["modelspec.resolution"], entries["modelspec.prediction_type"]) == (
        "768x768",
        "v",
    )
    assert metadata(merged.place.hyper_model)["modelspec.prediction_type"] == "v"


def test_an_average_that_predicts_noise_has_none(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.05) for seed in (1, 2)))
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert not merged.place.hyper_model.with_suffix(".yaml").exists()
    assert metadata(merged.loras[0])["modelspec.prediction_type"] == "epsilon"


def test_configuration_of_a_checkpoint_is_copied(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.05) for seed in (1, 2)))
    configuration = "model: {params: {parameterization: v}}  # mine\n"
    for path in models:
        path.with_suffix(".yaml").write_text(configuration)
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert merged.place.hyper_model.with_suffix(".yaml").read_text() == configuration


def test_mixed_prediction_types_are_refused(tmp_path):
    spreads = (0.12, 0.12, 0.05)
    models = files(
        tmp_path, *(predicting(few(two()), n, spread) for n, spread in enumerate(spreads))
    )
    with pytest.raises(
        MismatchError, match=r"^2 are Stable Diffusion 2.x with v-prediction, 1 is "
    ):
        merge(models, tmp_path / "models")


def test_sdxl_markers_are_kept_and_configured(tmp_path):
    markers = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    models = files(
        tmp_path, *({**state(few(xl()), n, dtype=torch.float16), **markers} for n in (1, 2))
    )
    merged = merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert markers.keys() <= load_file(merged.place.hyper_model).keys()
    config = yaml.safe_load(merged.place.hyper_model.with_suffix(".yaml").read_text())
    scaling = config["model"]["params"]["denoiser_config"]["params"]["scaling_config"]
    assert scaling["target"].endswith(".VScaling")
    assert metadata(merged.loras[0])["modelspec.prediction_type"] == "v"


def test_existing_configuration_is_not_replaced(tmp_path):
    models = files(tmp_path, *(predicting(few(two()), seed, 0.12) for seed in (1, 2)))
    place = tmp_path / "models" / "Stable-diffusion"
    place.mkdir(parents=True)
    (place / "mix.yaml").write_text("mine")
    with pytest.raises(OSError, match=r"mix\.yaml"):
        merged_exactly(models, tmp_path, ranks=(2,), dtype="float16")
    assert [path.name for path in place.iterdir()] == ["mix.yaml"]
    assert (place / "mix.yaml").read_text() == "mine"
