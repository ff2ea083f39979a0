import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hyper_merge.checkpoints.architectures.detection import FAMILIES, detect_family
from hyper_merge.checkpoints.architectures.families import family_named
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.compatibility import (
    check_compatible,
    check_distinct,
    find_differing_markers,
    find_missing_parts,
    find_mixed_strains,
)
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, MismatchError

BIAS = "model.diffusion_model.out.2.bias"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture
def check(make_header, narrow):
    """Checks that checkpoints with these changes of the narrow layout are alike."""

    def run(*changes, names="abcdef", families=None):
        headers = []
        for name, change in zip(names, changes, strict=False):
            shapes = {k: v for k, v in {**narrow, **change}.items() if v is not None}
            headers.append(make_header(shapes, name=f"{name}.safetensors"))
        detected = families or [detect_family(header) for header in headers]
        check_compatible(headers, [layout_of(h, f) for h, f in zip(headers, detected, strict=True)])

    return run


def test_equal_layouts_are_alike(check):
    check({}, {}, {})


def test_copied_and_dropped_keys_may_differ(check):
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    check({}, {"model_ema.decay": (), ids: None}, {"alphas_cumprod": (1000,), "v_pred": (0,)})


def test_missing_keys_are_counted_and_both_files_named(check):
    with pytest.raises(MismatchError) as refusal:
        check({}, {}, {BIAS: None, FIRST.replace("weight", "bias"): None})
    first = FIRST.replace("weight", "bias")
    assert str(refusal.value) == (
        f"c.safetensors lacks 2 of a.safetensors' 1130 keys (first: {first});"
        " choose checkpoints of one family"
    )


def test_extra_keys_are_counted_and_both_files_named(check):
    extra = {"model.diffusion_model.extra.weight": (4, 4)}
    with pytest.raises(MismatchError, match=r"b.safetensors has 1 key that a.safetensors lacks \("):
        check({}, extra)


def test_other_shapes_are_told(check):
    with pytest.raises(MismatchError) as refusal:
        check({}, {BIAS: (8,)})
    assert str(refusal.value) == (
        f"b.safetensors and a.safetensors differ in shape in 1 key (first: {BIAS}"
        " [8] against [4]); choose checkpoints of one family"
    )


def test_mixed_families_are_counted_and_listed(check):
    named = {family.name: family for family in FAMILIES}
    families = [named["sdxl"], named["sd1"], named["sdxl"], named["sdxl"]]
    with pytest.raises(MismatchError) as refusal:
        check({}, {}, {}, {}, families=families)
    assert str(refusal.value) == (
        "3 are Stable Diffusion XL, 1 is Stable Diffusion 1.x: a.safetensors, c.safetensors,"
        " d.safetensors / b.safetensors; choose checkpoints of one family"
    )


def test_files_of_one_name_are_shown_with_folders(check):
    with pytest.raises(MismatchError, match=r"two/x.safetensors lacks 1 of one/x.safetensors' "):
        check({}, {BIAS: None}, names=("one/x", "two/x"))


def test_other_markers_than_the_firsts_are_told(make_header, narrow):
    headers = [
        make_header({**narrow, **dict.fromkeys(marks, (0,))}, name=f"{name}.safetensors")
        for name, marks in {
            "a": ["v_pred", "ztsnr"],
            "b": ["v_pred"],
            "c": ["v_pred", "ztsnr"],
        }.items()
    ]
    assert find_differing_markers(headers) == [
        "b.safetensors and a.safetensors differ in ztsnr; the hyper-model is marked as a.safetensors is"
    ]
    assert find_differing_markers(headers[::2]) == []


@pytest.mark.parametrize(
    ("family", "names", "word", "told"),
    [
        ("z_image", ["ZImage_Turbo_v2", "mine"], "turbo", ["ZImage_Turbo_v2.safetensors"]),
        ("wan", ["wan2.2_low_noise", "wan2.2_high", "b-Low"], "high", ["wan2.2_high.safetensors"]),
        ("qwen_image", ["qwen_Edit_2509", "qwen"], "edit", ["qwen_Edit_2509.safetensors"]),
        ("qwen_image", ["edited", "qwen"], "", []),
        ("z_image", ["my turbo", "turbo-2"], "", []),
        ("sd1", ["turbo", "base"], "", []),
    ],
)
def test_names_of_other_trainings_are_told(make_header, family, names, word, told):
    headers = [make_header({}, name=f"{name}.safetensors") for name in names]
    warnings = find_mixed_strains(headers, family_named(family))
    assert len(warnings) == bool(told)
    for warning in warnings:
        assert warning.startswith(", ".join(told))
        assert f'called "{word}"' in warning


def test_what_a_hyper_model_will_lack_is_told(make_header, narrow):
    def said(*prefixes):
        header = make_header({k: v for k, v in narrow.items() if k.startswith(prefixes)})
        return find_missing_parts(header, layout_of(header, named["sd1"]))

    named = {family.name: family for family in FAMILIES}
    unet, text, vae = "model.diffusion_model.", "cond_stage_model.", "first_stage_model."
    ending = ": the hyper-model needs it from elsewhere"
    assert said(unet) == [f"the files hold no text encoder and no VAE{ending}"]
    assert said(unet, vae) == [f"the files hold no text encoder{ending}"]
    assert said(unet, text) == [f"the files hold no VAE{ending}"]
    assert said(unet, text, vae) == []


def save(path: Path, value: float) -> Path:
    save_file({"x": torch.full((4,), value)}, path)
    return path


def read(*paths: Path):
    return [read_header(path) for path in paths]


def test_different_files_are_distinct(tmp_path):
    paths = [save(tmp_path / f"{value}.safetensors", value) for value in (1.0, 2.0)]
    assert check_distinct(read(*paths)) == []


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_one_file_given_twice_is_refused(tmp_path, link):
    path = save(tmp_path / "a.safetensors", 1.0)
    other, text = path, "a.safetensors is given twice"
    if link:
        other, text = tmp_path / "b.safetensors", r"a.safetensors and .*b.safetensors are the same"
        link(path, other)
    with pytest.raises(MismatchError, match=text):
        check_distinct(read(path, other))


def test_equal_content_is_a_warning(tmp_path):
    paths = [save(tmp_path / f"{name}.safetensors", 1.0) for name in "ab"]
    paths.append(save(tmp_path / "c.safetensors", 2.0))
    assert check_distinct(read(*paths)) == ["a.safetensors and b.safetensors have the same content"]


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        ("abc", "a.safetensors, b.safetensors and c.safetensors"),
        ("abcdefg", "a.safetensors, b.safetensors, c.safetensors and 4 more"),
    ],
)
def test_many_files_of_equal_content_are_one_warning(tmp_path, names, listed):
    paths = [save(tmp_path / f"{name}.safetensors", 1.0) for name in names]
    assert check_distinct(read(*paths)) == [f"{listed} have the same content"]


def test_a_missing_file_is_told(tmp_path):
    headers = read(save(tmp_path / "a.safetensors", 1.0))
    headers[0].path.unlink()
    with pytest.raises(CheckpointError, match="cannot be compared with the others"):
        check_distinct(headers)
