"""Transformers as diffusers' own converters store them are read as the checkpoints that they were."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from narrow_layouts import FULL, NARROW, UNET
from safetensors.torch import load_file, save_file
from tiny_family import merge

from hyper_merge.checkpoints.architectures.detection import detect_family, require_supported
from hyper_merge.checkpoints.architectures.key_conversion import with_standard_keys
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import FamilyError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the library, on being imported
    converters = pytest.importorskip("diffusers.loaders.single_file_utils")

CONVERTERS = {
    "flux_dev": "flux_transformer_checkpoint",
    "flux_schnell": "flux_transformer_checkpoint",
    "chroma": "chroma_transformer_checkpoint",
    "sd3_medium": "sd3_transformer_checkpoint",
    "sd35_large": "sd3_transformer_checkpoint",
    "sd35_medium": "sd3_transformer_checkpoint",
    "z_image": "z_image_transformer_checkpoint",
    "lumina_2": "lumina2",
    "flux2_klein": "flux2_transformer_checkpoint",
    "flux2_dev": "flux2_transformer_checkpoint",
    "wan": "wan_transformer",
    "wan_i2v": "wan_transformer",
}
PREFIXES = ("", UNET)


def split_in_proportion(tensor, sizes, dim=0):
    """Splits as torch does, of a narrow network in the proportions of a whole one."""
    return torch.split(tensor, [x * tensor.shape[dim] // sum(sizes) for x in sizes], dim)


def in_diffusers(name, tensors, monkeypatch):
    """Returns a transformer's tensors as diffusers has them."""
    convert = getattr(converters, f"convert_{CONVERTERS[name]}_to_diffusers", None)
    if convert is None:
        pytest.skip("this version of diffusers does not convert it")
    proportional = SimpleNamespace(split=split_in_proportion, chunk=torch.chunk, cat=torch.cat)
    monkeypatch.setattr(converters, "torch", proportional)
    return convert({key.removeprefix(UNET): x for key, x in tensors.items()})


def transformer(layout):
    return {key: shape for key, shape in layout().items() if key.startswith(UNET)}


def random_tensors(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = transformer(NARROW[name])
    return {key: torch.randn(shape, generator=generator).half() for key, shape in shapes.items()}


def saved(path, tensors, prefix=""):
    save_file({prefix + key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", CONVERTERS)
def test_every_tensor_is_read_as_it_was(tmp_path, monkeypatch, name, prefix):
    tensors = random_tensors(name)
    path = saved(tmp_path / "a.safetensors", in_diffusers(name, tensors, monkeypatch), prefix)
    with CheckpointReader(path) as checkpoint:
        assert require_supported(checkpoint.header).name == name
        assert set(checkpoint.header.tensors) == set(tensors)
        for key, tensor in tensors.items():
            assert checkpoint.header.tensors[key] == TensorInfo(tensor.dtype, tensor.shape)
            assert torch.equal(checkpoint.tensor(key), tensor), key


@pytest.mark.parametrize("name", CONVERTERS)
def test_all_of_a_whole_network_are_known(monkeypatch, name):
    with torch.device("meta"):
        tensors = {key: torch.empty(shape) for key, shape in transformer(FULL[name]).items()}
    converted = in_diffusers(name, dict(tensors), monkeypatch)
    infos = {key: TensorInfo(x.dtype, tuple(x.shape)) for key, x in converted.items()}
    header = with_standard_keys(Header("a.safetensors", infos, {}, 0, 0))
    expected = {key: TensorInfo(x.dtype, tuple(x.shape)) for key, x in tensors.items()}
    assert dict(header.tensors) == expected


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_types_are_kept(tmp_path, monkeypatch, dtype):
    tensors = in_diffusers("flux_dev", random_tensors("flux_dev"), monkeypatch)
    expected = {key: x.to(dtype) for key, x in random_tensors("flux_dev").items()}
    path = saved(tmp_path / "a.safetensors", {key: x.to(dtype) for key, x in tensors.items()})
    with CheckpointReader(path) as checkpoint:
        for key, info in checkpoint.header.tensors.items():
            assert info.dtype == dtype
            assert torch.equal(checkpoint.tensor(key).float(), expected[key].float()), key


def test_what_stands_beside_the_transformer_stays(tmp_path, monkeypatch):
    beside = {"vae.decoder.conv_in.weight": torch.ones(4, 4), "text_encoders.x.y": torch.ones(2)}
    tensors = in_diffusers("sd3_medium", random_tensors("sd3_medium"), monkeypatch)
    for prefix in PREFIXES:
        named = {prefix + key: tensor for key, tensor in tensors.items()}
        path = saved(tmp_path / f"{len(prefix)}.safetensors", {**named, **beside})
        with CheckpointReader(path) as checkpoint:
            assert len(checkpoint.header.tensors) == len(random_tensors("sd3_medium")) + 2
            for key, tensor in beside.items():
                assert torch.equal(checkpoint.tensor(key), tensor)


def changed(tensors, change):
    """Returns what a file has instead that is not whole."""
    if change == "a tensor that nobody knows":
        return {**tensors, "somewhere.weight": torch.ones(2)}
    if change == "a part that is missing":
        return {key: x for key, x in tensors.items() if not key.endswith("attn.to_k.weight")}
    if change == "a block that is missing":
        return {key: x for key, x in tensors.items() if not key.startswith("transformer_blocks.0.")}
    if change == "the first of several files":
        return {key: x for key, x in tensors.items() if not key.startswith("proj_out.")}
    return {key: x.float() if key.endswith("to_v.weight") else x for key, x in tensors.items()}


@pytest.mark.parametrize(
    "change",
    [
        "a tensor that nobody knows",
        "a part that is missing",
        "a block that is missing",
        "the first of several files",
        "parts of different types",
    ],
)
def test_what_is_not_whole_is_refused_by_its_layout(tmp_path, monkeypatch, change):
    tensors = in_diffusers("flux_dev", random_tensors("flux_dev"), monkeypatch)
    path = saved(tmp_path / "a.safetensors", changed(tensors, change))
    with pytest.raises(FamilyError, match="in diffusers' layout"):
        detect_family(read_header(path))


def test_such_files_are_merged_with_others(tmp_path, monkeypatch):
    first, second = (random_tensors("z_image", seed) for seed in (1, 2))
    plain = saved(tmp_path / "a.safetensors", first)
    for seed, tensors in ((3, second), (4, in_diffusers("z_image", second, monkeypatch))):
        other = saved(tmp_path / f"b{seed}.safetensors", tensors)
        merge((plain, other), tmp_path / f"m{seed}", name="mix", ranks=(2,), exact="none")
    means = [
        load_file(tmp_path / f"m{seed}" / "Stable-diffusion" / "mix.safetensors") for seed in (3, 4)
    ]
    assert means[0].keys() == means[1].keys() == first.keys()
    for key, tensor in means[0].items():
        assert torch.equal(tensor, means[1][key])
