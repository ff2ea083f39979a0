"""LoRA files of every spelling are read as the same factors; what is none is refused by name."""

import json

import numpy as np
import pytest
import torch
from lora_files import (
    COMFY,
    CONV,
    DIFFUSERS,
    KEY,
    OUT,
    QUERY,
    SHAPES,
    TEXT,
    factors,
    kohya,
    spelled,
    write,
)

from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import CheckpointError, HyperMergeError, NonFiniteError
from hyper_merge.loras.input_keys import split_keys
from hyper_merge.loras.input_lora import InputLora
from hyper_merge.loras.input_modules import LoraModules
from hyper_merge.operations.loras.known_layers import known_family

PAIRS = factors()
BARE = {module: name.removeprefix("unet.") for module, name in DIFFUSERS.items()}
PEFT = {module: f"base_model.model.{name}" for module, name in DIFFUSERS.items()}
LDM = {
    module: "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
    if name.startswith("diffusion_model.")
    else module.replace("lora_te_", "lora_te1_")
    for module, name in COMFY.items()
}
PROCESSORS = {
    QUERY: DIFFUSERS[QUERY].replace(".to_q", ".processor.to_q"),
    OUT: DIFFUSERS[OUT].replace(".to_out.0", ".processor.to_out"),
}


def modules_of(path):
    header = read_header(path)
    return LoraModules(header, split_keys(header), known_family("sd1").index)


def changes(path):
    modules = modules_of(path)
    with InputLora(modules) as lora:
        products = {name: lora.factors(name) for name in lora.modules}
    return {name: (up @ down).numpy() for name, (up, down) in products.items()}


@pytest.mark.parametrize(
    ("names", "up", "down"),
    [
        ({name: name for name in SHAPES}, "lora_up.weight", "lora_down.weight"),
        (LDM, "lora_up.weight", "lora_down.weight"),
        (DIFFUSERS, "lora_B.weight", "lora_A.weight"),
        (DIFFUSERS, "lora.up.weight", "lora.down.weight"),
        (DIFFUSERS, "lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        (BARE, "lora_B.weight", "lora_A.weight"),
        (PEFT, "lora_B.default.weight", "lora_A.default.weight"),
        (COMFY, "lora_up.weight", "lora_down.weight"),
        (COMFY, "lora_B.weight", "lora_A.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_every_spelling_is_read_alike(tmp_path, names, up, down, alpha):
    path = write(tmp_path / "a.safetensors", spelled(PAIRS, names, up, down, alpha))
    found = changes(path)
    assert set(found) == set(SHAPES)
    for module, (left, right) in PAIRS.items():
        expected = left.astype("f8") @ right.astype("f8") * (1.0 if alpha is None else alpha / 4)
        np.testing.assert_allclose(found[module], expected, atol=1e-9)


def test_attention_processors_of_2023_are_read(tmp_path):
    pairs = {module: PAIRS[module] for module in PROCESSORS}
    state = {}
    for key, tensor in kohya(pairs).items():
        module, _, end = key.partition(".lora_")
        state[f"{PROCESSORS[module]}_lora.{end}"] = tensor
    assert set(changes(write(tmp_path / "a.safetensors", state))) == {QUERY, OUT}


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"unet.lora_alpha": 8, "unet.r": 4}, 2.0),
        ({"unet.lora_alpha": 8, "unet.r": 4, "unet.use_rslora": True}, 4.0),
        ({"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ("no object", 1.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": [2]}, 2.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": 7}, 2.0),
    ],
)
def test_settings_of_peft_scale_what_has_no_alpha(tmp_path, settings, scale):
    pairs = {QUERY: PAIRS[QUERY]}
    state = spelled(pairs, DIFFUSERS, "lora_B.weight", "lora_A.weight")
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    found = changes(write(tmp_path / "a.safetensors", state, metadata))[QUERY]
    up, down = (part.astype("f8") for part in PAIRS[QUERY])
    np.testing.assert_allclose(found, up @ down * scale, atol=1e-9)


@pytest.mark.parametrize("alpha", ["0", "-1", "NaN", "Infinity", "1e308", "1" + "0" * 400])
def test_a_scale_of_peft_that_is_no_number_above_0_is_refused(tmp_path, alpha):
    state = spelled({QUERY: PAIRS[QUERY]}, DIFFUSERS, "lora_B.weight", "lora_A.weight")
    metadata = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
    path = write(tmp_path / "a.safetensors", state, metadata)
    with pytest.raises(
        CheckpointError, match=r"a\.safetensors says the alpha .* expected a number"
    ):
        changes(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_every_type_is_read_as_stored(tmp_path, dtype):
    state = {key: tensor.to(dtype) for key, tensor in kohya({QUERY: PAIRS[QUERY]}).items()}
    path = write(tmp_path / "a.safetensors", state)
    up, down = (
        state[f"{QUERY}.lora_{side}.weight"].to(torch.float32).double() for side in ("up", "down")
    )
    np.testing.assert_allclose(changes(path)[QUERY], (up @ down).numpy(), atol=1e-12)
    usable = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    assert InputLora(modules_of(path)).dtype == usable


def with_key(name, shape=(3,)):
    return {**kohya({QUERY: PAIRS[QUERY]}), name: torch.ones(shape)}


def mistaken(module, name):
    up, down = (torch.tensor(part) for part in PAIRS[module])
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (with_key(f"{QUERY}.dora_scale"), ["dora_scale", "base"]),
        (with_key("unet.x.lora_magnitude_vector"), ["lora_magnitude_vector", "base"]),
        (with_key(f"{QUERY}.diff_b"), ["diff_b", "norms or biases"]),
        (with_key(f"{QUERY}.oft_blocks"), ["oft_blocks", "multiplied"]),
        (with_key(f"{QUERY}.a1.weight"), ["a1.weight", "multiplied"]),
        (with_key(f"{QUERY}.set_weight"), ["set_weight", "replaces"]),
        (with_key("emb_params"), ["emb_params", "no tensor of a LoRA"]),
        ({f"{QUERY}.alpha": torch.tensor(1.0)}, ["no LoRA"]),
        (with_key("lora_unet_middle.lora_up.weight"), ["lora_unet_middle", "unknown"]),
        ({f"{QUERY}.lora_up.weight": torch.ones(320, 4)}, [QUERY, "half"]),
        (mistaken(QUERY, KEY), [KEY, "320 x 320", "320 x 768"]),
        (kohya(PAIRS) | spelled({QUERY: PAIRS[QUERY]}, COMFY, "lora_up.weight", "lora_down.weight"),
         ["twice"]),
        ({key: x.int() for key, x in kohya({QUERY: PAIRS[QUERY]}).items()}, ["no float"]),
    ],
)  # fmt: skip
def test_what_is_no_plain_lora_is_refused_by_name(tmp_path, state, words):
    path = write(tmp_path / "bad.safetensors", state)
    with pytest.raises(CheckpointError) as caught:
        modules_of(path)
    assert all(word in str(caught.value) for word in ["bad.safetensors", *words])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_useless_alpha_is_refused(tmp_path, alpha):
    state = kohya({QUERY: PAIRS[QUERY]}, alpha)
    with pytest.raises(CheckpointError, match="alpha"):
        changes(write(tmp_path / "a.safetensors", state))


def test_infinity_is_refused_by_its_key(tmp_path):
    state = kohya({TEXT: PAIRS[TEXT], CONV: PAIRS[CONV]})
    state[f"{CONV}.lora_up.weight"][3, 2] = float("inf")
    with pytest.raises(NonFiniteError, match=f"1 of 1280 values of {CONV}.lora_up.weight"):
        changes(write(tmp_path / "a.safetensors", state))


def test_a_file_that_changes_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", kohya(PAIRS))
    modules = modules_of(path)
    write(path, kohya({QUERY: PAIRS[QUERY]}))
    with pytest.raises(HyperMergeError, match="changed"), InputLora(modules) as lora:
        lora.factors(QUERY)


@pytest.mark.parametrize(
    ("end", "value"), [("lora_up.weight", 1e33), ("lora_down.weight", 1e8), ("alpha", 1e6)]
)
def test_values_that_no_network_can_bear_are_refused(tmp_path, end, value):
    state = kohya({QUERY: PAIRS[QUERY]}, 4)
    state[f"{QUERY}.{end}"].view(-1)[0] = value
    path = write(tmp_path / "a.safetensors", state)
    if end == "alpha":
        state[f"{QUERY}.lora_up.weight"] *= 100
        write(path, state)
    with pytest.raises(NonFiniteError, match=rf"a\.safetensors is wildly off .* {QUERY}"):
        changes(path)
