"""Weights by block, as the extension LoRA Block Weight has them, go into what is made of LoRAs."""

import numpy as np
import pytest
import torch
from lora_files import CONV, KEY, QUERY, TEXT, dense, write_few, write_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import layers_of

from hyper_merge.errors import ExtractionError, RecipeError
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.combine import run_combine
from hyper_merge.operations.loras.request import ApplyRequest, CombineRequest
from hyper_merge.recipe.lora_block_weights import parse_lora_block_weights, weight_in
from hyper_merge.runtime.progress import Progress

ZEROS = "0," * 15
IN01 = f"ONE:0.5,2,{ZEROS}"[:-1]  # of 17: half of the text encoder, twice of IN01, nothing else


def combined(paths, to, blocks, **settings):
    values = {"loras": paths, "to": to, "block_weights": blocks, **settings}
    return run_combine(CombineRequest.parse(values, str), Progress())


def test_every_block_has_its_weight(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", 0)
    result = combined([path], tmp_path / "b.safetensors", [IN01], multipliers="3")
    before, after = dense(path), dense(result.path)
    factors = {TEXT: 0.5, QUERY: 2, KEY: 2, CONV: 2}
    for module, factor in factors.items():
        np.testing.assert_allclose(after[module], 3 * factor * before[module], atol=2e-5)
    with safe_open(result.path, "pt") as file:
        assert any("0.5,2,0" in text for text in file.metadata().values())


def test_blocks_of_no_weight_are_left_out(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", 0)
    result = combined([path], tmp_path / "b.safetensors", [f"1,{ZEROS}0"], rank=2)
    assert set(dense(result.path)) == {TEXT}
    assert result.rank == 2


def test_each_lora_has_its_own(tmp_path):
    paths = [write_lora(tmp_path / f"{c}.safetensors", c) for c in range(2)]
    ones = ",".join(["1"] * 17)
    result = combined(paths, tmp_path / "c.safetensors", [IN01, ones])
    one, two = map(dense, paths)
    after = dense(result.path)
    np.testing.assert_allclose(after[QUERY], 2 * one[QUERY] + two[QUERY], atol=2e-5)
    np.testing.assert_allclose(after[TEXT], 0.5 * one[TEXT] + two[TEXT], atol=2e-5)


def test_nothing_at_all_is_refused(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", 0)
    with pytest.raises(ExtractionError, match="add up to nothing"):
        combined([path], tmp_path / "b.safetensors", [f"0,{ZEROS}0"])


def test_they_count_where_loras_are_taken_from_a_checkpoint(tmp_path, files):
    layers = [x for x in layers_of(files[0]) if x.section == "IN01" or x.part != "unet"]
    state = {}
    for place, layer in enumerate(layers):
        up = np.full((layer.m, 1), 0.01 * (1 + place % 3), "f4").reshape(layer.up_shape(1))
        state[f"{layer.module}.lora_up.weight"] = up
        state[f"{layer.module}.lora_down.weight"] = np.ones(layer.down_shape(1), "f4")
    lora = tmp_path / "lora.safetensors"
    save_file({key: torch.tensor(value) for key, value in state.items()}, lora)
    request = ApplyRequest.parse(
        {
            "loras": [lora],
            "checkpoint": files[0],
            "subtract": True,
            "block_weights": [IN01],
            "to": tmp_path / "m.safetensors",
        },
        str,
    )
    run_apply(request, Progress())
    before, after = load_file(files[0]), load_file(tmp_path / "m.safetensors")
    for layer in layers:
        factor = 2 if layer.part == "unet" else 0.5
        up = state[f"{layer.module}.lora_up.weight"].reshape(layer.m, 1)
        change = (after[layer.key].float() - before[layer.key].float()).reshape(layer.m, layer.n)
        np.testing.assert_allclose(change, -factor * up @ np.ones((1, layer.n)), atol=3e-3)


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        (["1,2,3"], "3 here"),
        (["1,x" + ",1" * 15], "17 or 26"),
        ([",".join("1" * 17)] * 2, "one per LoRA, got 2"),
        ("1,1", "a list of weights by block"),
    ],
)
def test_other_texts_are_refused(tmp_path, blocks, text):
    with pytest.raises(RecipeError, match=text):
        CombineRequest.parse({"loras": [tmp_path / "a"], "block_weights": blocks}, str)


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (" lbw=0.5,2,0,0,0,0,0,0,0,0,0,0", (0.5, 2, *[0] * 10)),
        (":LBW=OUTD", (1, *[0] * 7, 1, 1, 1, 1, *[0] * 5)),
        ("INS", (1, 1, 1, 1, *[0] * 13)),
        ("MINE: " + ",".join("1" * 61), (1,) * 61),
        ("-0.5", (-0.5,)),
        (2, (2,)),
    ],
)
def test_texts_of_the_extension_are_read(text, weights):
    assert parse_lora_block_weights([text]) == (weights,)


def test_one_number_is_for_everything(tmp_path):
    path = write_lora(tmp_path / "a.safetensors", 0)
    result = combined([path], tmp_path / "b.safetensors", [0.5], multipliers="2")
    before, after = dense(path), dense(result.path)
    assert after.keys() == before.keys()
    for module, change in before.items():
        np.testing.assert_allclose(after[module], change, atol=2e-5)


def test_the_blocks_of_flux_have_their_weights(tmp_path):
    numbers = [0] * 61
    numbers[2], numbers[4], numbers[23] = 3, 0.5, 2  # IN, D01, S01
    names = {
        "unet_img_in": 3,
        "unet_double_blocks_1_img_attn_proj": 0.5,
        "unet_single_blocks_1_linear2": 2,
    }
    paths = [write_few(tmp_path / f"{name}.safetensors", "flux_dev", name) for name in names]
    result = combined(paths, tmp_path / "b.safetensors", [numbers] * 3)
    state = load_file(result.path)
    assert len(state) == 9
    for name, factor in names.items():
        up, down = (state[f"lora_{name}.lora_{x}.weight"].mean() for x in ("up", "down"))
        assert float(up * down) == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize(
    ("network", "count"), [("sd1", 12), ("sdxl", 26), ("flux_dev", 20), ("chroma", 61)]
)
def test_those_of_another_network_are_refused(tmp_path, network, count):
    pattern = "double_blocks_0_img_attn_proj" if network in ("flux_dev", "chroma") else "attn1_to_q"
    metadata = {"ss_base_model_version": "chroma"} if network == "chroma" else {}
    path = write_few(tmp_path / "a.safetensors", network, pattern, metadata)
    with pytest.raises(RecipeError, match="weights by block do not go with"):
        combined([path], tmp_path / "b.safetensors", [",".join("1" * count)])


@pytest.mark.parametrize(
    ("count", "blocks"),
    [
        (12, ["IN04", "IN05", "IN07", "IN08", "MID", *(f"OUT{i:02d}" for i in range(6))]),
        (17, ["IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "MID"]),
        (20, [*(f"IN{i:02d}" for i in range(9)), "MID", *(f"OUT{i:02d}" for i in range(9))]),
        (26, [*(f"IN{i:02d}" for i in range(12)), "MID", *(f"OUT{i:02d}" for i in range(12))]),
    ],
)
def test_the_order_is_that_of_the_extension(count, blocks):
    (weights,) = parse_lora_block_weights([",".join(map(str, range(count)))])
    assert [weight_in(weights, block, in_unet=True) for block in blocks] == list(
        range(1, len(blocks) + 1)
    )
    assert weight_in(weights, "TIME", in_unet=True) == 1
