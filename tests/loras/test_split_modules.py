"""Modules that diffusers has split or under other names are read as the family's, on the rows that are theirs."""

import json

import numpy as np
import pytest
import torch
from lora_files import write
from narrow_layouts import NARROW, UNET
from safetensors.torch import load_file, save_file
from split_loras import PARTS, dense, factors, index, layout, read, spelled

from hyper_merge.errors import CheckpointError, NonFiniteError
from hyper_merge.operations.loras.apply import run_apply
from hyper_merge.operations.loras.request import ApplyRequest
from hyper_merge.operations.loras.unfinished import require_complete
from hyper_merge.runtime.progress import Progress

SPELLINGS = {
    "diffusers": ("transformer.", ("lora_B", "lora_A")),
    "onetrainer": ("lora_transformer_", ("lora_up", "lora_down")),
    "simpletuner": ("lycoris_", ("lora_up", "lora_down")),
    "bare": ("", ("lora_B", "lora_A")),
}
SINGLE = "single_transformer_blocks.1."
QKV = [f"{SINGLE}attn.to_{x}" for x in "qkv"]


def products(pairs, scales=None):
    return {name: up @ down * (scales or {}).get(name, 1) for name, (up, down) in pairs.items()}


def require_equal(found, expected):
    assert set(found) == set(expected)
    for stored, (up, down) in found.items():
        np.testing.assert_allclose((up @ down).numpy(), expected[stored], atol=1e-12)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", PARTS)
def test_all_parts_are_put_onto_their_rows(tmp_path, family, spelling):
    pairs = factors(family, PARTS[family])
    alphas = {name: 1 + place % 4 for place, name in enumerate(pairs)}
    path = write(tmp_path / "a.safetensors", spelled(pairs, *SPELLINGS[spelling], alphas), {})
    scales = {name: alphas[name] / up.shape[1] for name, (up, _) in pairs.items()}
    require_equal(read(path, family)[1], dense(family, products(pairs, scales)))


@pytest.mark.parametrize("kept", [0, 1, 2])
@pytest.mark.parametrize("family", PARTS)
def test_rows_of_parts_that_are_missing_are_zeros(tmp_path, family, kept):
    pairs = factors(family, list(PARTS[family])[kept::3])
    path = write(tmp_path / "a.safetensors", spelled(pairs), {})
    require_equal(read(path, family)[1], dense(family, products(pairs)))


def test_lumina_is_read_under_names_like_those_of_z_image_too(tmp_path):
    pairs = factors("lumina_2", [f"layers.1.attn.to_{x}" for x in ("q", "k", "v", "out.0")])
    tensors = {key.replace(".attn.", ".attention."): x for key, x in spelled(pairs).items()}
    path = write(tmp_path / "a.safetensors", tensors, {})
    require_equal(read(path, "lumina_2")[1], dense("lumina_2", products(pairs)))


def test_a_factor_that_all_parts_share_is_kept_once(tmp_path):
    pairs = factors("flux_dev", [*QKV, f"{SINGLE}proj_mlp"], ranks=(2,))
    common = pairs[QKV[0]][1]
    pairs = {name: (up, common) for name, (up, _) in pairs.items()}
    path = write(tmp_path / "a.safetensors", spelled(pairs), {})
    modules, found = read(path, "flux_dev")
    require_equal(found, dense("flux_dev", products(pairs)))
    assert found["single_blocks.1.linear1"][0].shape == (56, 2)
    assert set(modules.ranks.values()) == {8}  # by the header alone it could be 4 times 2


def test_factors_that_some_parts_share_are_kept_once_each(tmp_path):
    pairs = factors("flux_dev", [*QKV, f"{SINGLE}proj_mlp"], ranks=(2,))
    pairs[QKV[2]] = (pairs[QKV[2]][0], pairs[QKV[0]][1])
    path = write(tmp_path / "a.safetensors", spelled(pairs), {})
    found = read(path, "flux_dev")[1]
    require_equal(found, dense("flux_dev", products(pairs)))
    assert found["single_blocks.1.linear1"][1].shape == (6, 8)


def test_parts_of_other_kinds_are_the_matrices_that_they_are(tmp_path):
    generator = np.random.default_rng(0)
    a, b, c, whole = (generator.standard_normal(s) for s in ((2, 4), (4, 2), (8, 8), (32, 8)))
    pairs = factors("flux_dev", QKV[2:])
    tensors = spelled(pairs) | {
        f"transformer.{QKV[0]}.lokr_w1": torch.tensor(a),
        f"transformer.{QKV[0]}.lokr_w2": torch.tensor(b),
        **{f"transformer.{QKV[1]}.hada_w{i}_a": torch.tensor(c[:, :2] * i) for i in (1, 2)},
        **{f"transformer.{QKV[1]}.hada_w{i}_b": torch.tensor(c[6:]) for i in (1, 2)},
        f"transformer.{SINGLE}proj_mlp.diff": torch.tensor(whole),
    }
    half = c[:, :2] @ c[6:]
    expected = products(pairs) | {
        QKV[0]: np.kron(a, b),
        QKV[1]: half * (2 * half),
        f"{SINGLE}proj_mlp": whole,
    }
    path = write(tmp_path / "a.safetensors", tensors, {})
    require_equal(read(path, "flux_dev")[1], dense("flux_dev", expected))


def test_settings_of_peft_are_those_of_each_part(tmp_path):
    pairs = factors("flux_dev", QKV, ranks=(2,))
    settings = {"transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn.to_k": 1}}
    metadata = {"lora_adapter_metadata": json.dumps(settings)}
    path = write(tmp_path / "a.safetensors", spelled(pairs), metadata)
    scales = {QKV[0]: 2.0, QKV[1]: 0.5, QKV[2]: 2.0}
    require_equal(read(path, "flux_dev")[1], dense("flux_dev", products(pairs, scales)))


def test_a_fused_module_is_split_where_the_family_is_written_split(tmp_path):
    generator = np.random.default_rng(0)
    up, down = generator.standard_normal((36, 2)), generator.standard_normal((2, 12))
    tensors = spelled({"layers.1.attention.qkv": (up, down)}, "diffusion_model.")
    path = write(tmp_path / "a.safetensors", tensors, {})
    modules, _ = read(path, "z_image")
    assert set(modules.layers) == {f"diffusion_model.layers.1.attention.to_{x}" for x in "qkv"}
    checkpoint, state = write_checkpoint(tmp_path / "model.safetensors", "z_image")
    changed = load_file(run(checkpoint, path))
    key = f"{UNET}layers.1.attention.qkv.weight"
    expected = state[key].numpy() + up @ down
    np.testing.assert_allclose(changed[key].numpy(), expected, atol=1e-5)


def write_checkpoint(path, family):
    generator = torch.Generator().manual_seed(1)
    state = {key: torch.randn(s, generator=generator) for key, s in NARROW[family]().items()}
    save_file(state, path)
    return path, state


def run(checkpoint, lora):
    request = ApplyRequest((lora,), checkpoint=checkpoint, to=lora.with_name("sum.safetensors"))
    return run_apply(request, Progress()).path


@pytest.mark.parametrize("family", PARTS)
def test_a_checkpoint_with_such_a_lora_is_changed_by_the_dense_matrix(tmp_path, family):
    checkpoint, state = write_checkpoint(tmp_path / "model.safetensors", family)
    pairs = factors(family, PARTS[family])
    changed = load_file(run(checkpoint, write(tmp_path / "a.safetensors", spelled(pairs), {})))
    changes = {f"{UNET}{k}.weight": x for k, x in dense(family, products(pairs)).items()}
    assert set(changes) == {key for key in state if not torch.equal(changed[key], state[key])}
    for key, change in changes.items():
        np.testing.assert_allclose(changed[key].numpy(), state[key].numpy() + change, atol=1e-5)


def pair(name, m=8, n=8):
    return spelled({name: (np.ones((m, 2)), np.ones((2, n)))})


@pytest.mark.parametrize(
    ("tensors", "words", "key"),
    [
        (pair(QKV[1], m=24), ["24 x 8", "expected 8 x 8"], f"transformer.{QKV[1]}"),
        (pair(QKV[1], n=9), ["8 x 9", "expected 8 x 8"], f"transformer.{QKV[1]}"),
        (pair("single_blocks.1.linear1", m=56), ["twice", "blocks.1.linear1"],
         f"transformer.{QKV[0]}"),
        (spelled({QKV[0]: (np.ones((8, 2)), np.ones((2, 8)))}, "lycoris_"), ["twice", "lycoris_"],
         f"transformer.{QKV[0]}"),
        (pair(f"{SINGLE}attn.to_qkv"), ["unknown"], f"transformer.{SINGLE}attn.to_qkv"),
        (pair("transformer_blocks.2.attn.to_q"), ["unknown"],
         "transformer.transformer_blocks.2.attn.to_q"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused_by_its_key(tmp_path, tensors, words, key):
    file = spelled(factors("flux_dev", [QKV[0], QKV[2]])) | tensors
    with pytest.raises(CheckpointError, match=r"bad\.safetensors") as caught:
        read(write(tmp_path / "bad.safetensors", file, {}), "flux_dev")
    assert caught.value.key == key
    assert caught.value.hint
    assert all(word in str(caught.value) for word in [*words, key])


def test_nan_in_a_part_is_refused_by_its_key(tmp_path):
    tensors = spelled(factors("flux_dev", QKV))
    tensors[f"transformer.{QKV[1]}.lora_B.weight"][0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"of transformer\.{QKV[1]}\.lora_B\.weight"):
        read(write(tmp_path / "a.safetensors", tensors, {}), "flux_dev")


def test_a_last_part_of_zeros_is_a_download_that_was_not_finished(tmp_path):
    tensors = spelled(factors("flux_dev", QKV, ranks=(2,)))
    for end in "AB":
        tensors[f"transformer.{QKV[2]}.lora_{end}.weight"].zero_()
    modules, _ = read(write(tmp_path / "a.safetensors", tensors, {}), "flux_dev")
    with pytest.raises(CheckpointError, match=rf"zeros in transformer\.{QKV[2]}"):
        require_complete(modules, lambda text: None, accepts_damaged=False)


@pytest.mark.parametrize("name", ["flux_dev", "sd35_medium", "lumina_2", "flux2_klein"])
def test_names_of_checkpoints_stay_whole(name):
    """The families' own names, in which files are written, mean what they meant."""
    found = index(name)
    for layer in layout(name).layers:
        (place,) = found.find(layer.module)
        assert (place.layer, place.rows, place.swapped) == (layer, (0, layer.m), False)
