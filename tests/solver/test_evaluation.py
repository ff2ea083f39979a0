"""Curve, similarity and sections in the report are those of dense arithmetic on the written files."""

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import added, layers_of, load, merge, write

from hyper_merge.checkpoints.architectures.sections import section_of


def deviations_and_blocks(models, merged):
    """Returns (k, all entries) and (R, all entries) in float64, and each entry's layer."""
    base, checkpoints = load(merged.place.hyper_model), [load(path) for path in models]
    loras = [load_file(path) for path in merged.loras]
    layers = layers_of(models[0])
    deviations = [
        torch.cat([(c[y.key].double() - base[y.key].double()).flatten() for y in layers])
        for c in checkpoints
    ]
    blocks = [
        torch.cat([added(lora, y.module).expand(y.m, y.n).flatten() for y in layers])
        for lora in loras
    ]
    sizes = torch.tensor([y.m * y.n for y in layers])
    return (
        torch.stack(deviations),
        torch.stack(blocks),
        torch.arange(len(sizes)).repeat_interleave(sizes),
    )


@pytest.fixture(scope="module")
def merged(files, tmp_path_factory):
    """A merge with one number for all parts and layers alike, as the dense arithmetic here has."""
    folder = tmp_path_factory.mktemp("shared")
    return merge(files, folder, multipliers="shared", layer_weights="plain")


@pytest.fixture(scope="module")
def dense(files, merged):
    return deviations_and_blocks(files, merged)


def test_the_curve_refits_the_first_loras(dense, merged):
    deviations, blocks, _ = dense
    energies = deviations.square().sum(1)
    expected = [torch.zeros(len(deviations)).double()]
    for count in range(1, len(blocks) + 1):
        first = blocks[:count]
        multipliers = torch.linalg.lstsq(first.T, deviations.T).solution.T
        left = (deviations - multipliers @ first).square().sum(1)
        expected.append(1 - left / energies)
    curve = torch.tensor(merged.report.curve).double()
    torch.testing.assert_close(curve, torch.stack(expected), atol=1e-6, rtol=0)


def test_the_curve_rises_from_nothing_to_what_is_explained(merged):
    curve = torch.tensor(merged.report.curve).double()
    assert (curve.diff(dim=0) >= -1e-9).all()
    assert curve[0].tolist() == [0, 0, 0]
    explained = [row.explained for row in merged.report.checkpoints]
    assert curve[-1].tolist() == pytest.approx(explained, abs=1e-6)


def test_the_similarity_is_the_cosine_of_the_deviations(dense, merged):
    deviations, _, _ = dense
    unit = deviations / deviations.norm(dim=1, keepdim=True)
    similarity = torch.tensor(merged.report.similarity).double()
    torch.testing.assert_close(similarity, unit @ unit.T, atol=1e-6, rtol=0)
    assert similarity.diagonal().tolist() == [1, 1, 1]


def test_the_similarity_is_relative_to_a_given_base(files, tmp_path):
    merged = merge(files[1:], tmp_path, base=str(files[0]))
    deviations, _, _ = deviations_and_blocks(files[1:], merged)
    expected = torch.nn.functional.cosine_similarity(*deviations, dim=0)
    assert merged.report.similarity[0][1] == pytest.approx(float(expected), abs=1e-6)


def test_each_section_has_its_share_of_the_loss(files, dense, merged):
    deviations, blocks, layer_of = dense
    multipliers = torch.tensor([row.multipliers for row in merged.report.checkpoints]).double()
    left = (deviations - multipliers @ blocks).square().sum(0)
    squares = deviations.square().sum(0)
    layers = layers_of(files[0])
    for part in merged.report.parts:
        inside = torch.tensor([(y.section, y.part) == (part.name, part.which) for y in layers])
        assert inside.any()
        energy, lost = (float(x[inside[layer_of]].sum() / squares.sum()) for x in (squares, left))
        assert part.energy == pytest.approx(energy, abs=1e-6)
        assert part.lost == pytest.approx(lost, abs=1e-6)
    assert sum(part.energy for part in merged.report.parts) == pytest.approx(1)
    assert sum(part.lost for part in merged.report.parts) == pytest.approx(merged.report.loss)


def test_the_sections_come_in_the_networks_order(merged):
    assert [(part.which, part.name) for part in merged.report.parts] == [
        ("text_encoder", "TE00"),
        ("unet", "IN01"),
        ("unet", "IN03"),
        ("unet", "MID"),
        ("unet", "OUT02"),
    ]


def test_equal_checkpoints_are_like_nothing_and_lose_nothing(tmp_path, state_of):
    models = [write(tmp_path / f"{name}.safetensors", state_of(0)) for name in "xy"]
    report = merge(models, tmp_path / "models").report
    assert report.curve == ((0, 0), (1, 1), (1, 1))
    assert report.similarity == ((1, 0), (0, 1))
    assert all((part.energy, part.lost) == (0, 0) for part in report.parts)


@pytest.mark.parametrize(
    ("path", "section"),
    [
        ("input_blocks.1.0.in_layers.2", "IN01"),
        ("input_blocks.11.0.emb_layers.1", "IN11"),
        ("middle_block.1.proj_in", "MID"),
        ("output_blocks.5.1.transformer_blocks.0.ff.net.0.proj", "OUT05"),
        ("encoder.layers.11.mlp.fc1", "TE11"),
        ("transformer.resblocks.23.mlp.c_fc", "TE23"),
        ("text_model.encoder.layers.3.self_attn.q_proj", "TE03"),
        ("joint_blocks.3.x_block.mlp.fc1", "JOINT03"),
        ("double_blocks.18.img_attn.qkv", "DOUBLE18"),
        ("single_blocks.37.linear1", "SINGLE37"),
        ("final_layer.linear", "FINAL"),
        ("time_embed.0", "TIME"),
        ("out.2", "OUT"),
        ("in_layers.2.proj", "other"),
    ],
)
def test_a_layer_lies_in_the_section_that_people_name(path, section):
    assert section_of(path) == section


def test_text_encoders_have_separate_sections():
    assert section_of("transformer.resblocks.23.mlp.c_fc", encoder="TE2.") == "TE2.23"
    assert section_of("middle_block.1.proj_in", encoder="TE2.") == "MID"
