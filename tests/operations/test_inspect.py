"""Every file has a row that says what it is, or why it cannot be merged; nothing large is read."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from sparse_checkpoints import full_size
from tiny_family import NORM, QUERY, UNET, VAE, recipe, write

from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import CheckpointError
from hyper_merge.operations.inspect import inspect_files
from hyper_merge.operations.inspect_text import format_inspection, format_vaes
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import run_preflight


def test_a_checkpoint_is_described(files):
    row = inspect_files(files[0])
    assert (row.name, row.path, row.problem) == ("a.safetensors", files[0], None)
    assert row.family == "Stable Diffusion 1.x"
    assert row.size == files[0].stat().st_size
    assert row.dtype == "fp16"
    assert len(row.legacy_hash) == 8
    assert row.vae is not None


@pytest.mark.parametrize("count", [1, 3])
def test_a_download_in_progress_is_named(tmp_path, files, count):
    paths = [Path(shutil.copy(path, tmp_path)) for path in files[:count]]
    assert "note:" not in format_inspection(paths)
    (tmp_path / "a.safetensors.part").touch()
    note = (
        "note: the download of a.safetensors is not finished: a.safetensors.part stands beside it"
    )
    assert note in format_inspection(paths).splitlines()


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_one_vae_is_alike_in_every_type_and_format(tmp_path, files, state_of, suffix):
    single = {key: tensor.float() for key, tensor in state_of(0).items()}  # exact
    copy = write(tmp_path / f"single.{suffix}", single)
    assert inspect_files(copy).vae == inspect_files(files[0]).vae
    rounded = write(tmp_path / f"rounded.{suffix}", state_of(0, torch.float32))
    assert inspect_files(rounded).vae == inspect_files(files[0]).vae
    assert inspect_files(rounded).dtype == "fp32"


def test_another_vae_is_recognised_by_one_small_tensor(tmp_path, files, state_of):
    state = state_of(0)
    state[VAE] = state[VAE].clone()
    state[VAE].view(-1)[0] += 1
    other = inspect_files(write(tmp_path / "other.safetensors", state))
    first = inspect_files(files[0])
    assert other.vae != first.vae
    assert format_vaes([first, first]) == "VAE: the same in all files"
    assert format_vaes([first, other, first]) == (
        "VAE: not the same in all files: a.safetensors, a.safetensors / other.safetensors"
    )


def test_a_checkpoint_without_vae_has_no_fingerprint(tmp_path, state_of):
    state = {k: t for k, t in state_of(0).items() if not k.startswith("first_stage_model.")}
    row = inspect_files(write(tmp_path / "bare.safetensors", state))
    assert row.vae is None
    assert format_vaes([row, row]) == "VAE: in none of the files"


def test_only_the_vaes_small_tensors_are_read(tmp_path, state_of, monkeypatch):
    big = "first_stage_model.decoder.big.weight"
    path = write(tmp_path / "a.safetensors", state_of(0) | {big: torch.zeros(4097).half()})
    read, tensor = [], CheckpointReader.tensor
    monkeypatch.setattr(
        CheckpointReader, "tensor", lambda self, key: read.append(key) or tensor(self, key)
    )
    inspect_files(path)
    assert VAE in read
    assert big not in read
    assert all(key.startswith("first_stage_model.") for key in read)


def test_types_are_those_of_merged_values_by_count(tmp_path, state_of):
    mixed = state_of(0)
    mixed[NORM] = mixed[NORM].float()
    mixed["model_ema.decay"] = torch.zeros(3).double()
    mixed["betas"] = torch.zeros(1000).double()
    assert inspect_files(write(tmp_path / "m.safetensors", mixed)).dtype == "mixed: fp16, fp32"
    brain = inspect_files(write(tmp_path / "b.safetensors", state_of(0, torch.bfloat16)))
    assert brain.dtype == "bf16"


def test_an_unsupported_family_has_its_name_and_a_problem(tmp_path):
    path = write(
        tmp_path / "f.safetensors",
        {
            f"{UNET}{key}": torch.zeros(2, 2)
            for key in ("distilled_guidance_layer.x", "nerf_blocks.0.x")
        },
    )
    row = inspect_files(path)
    assert row.problem.startswith(
        "f.safetensors is a Chroma Radiance checkpoint, which cannot be merged;"
    )
    found = (row.family, row.dtype, row.vae, len(row.legacy_hash))
    assert found == ("Chroma Radiance", "fp32", None, 8)


BAD = {
    "empty.safetensors": (b"", "is empty"),
    "garbage.safetensors": (b"\xff" * 5000, "garbage.safetensors"),
    "text.ckpt": (b"hello" * 100, "text.ckpt is damaged"),
    "odd.gguf": (b"GGUF", "a damaged one"),
    "notes.txt": (b"notes", "the suffix '.txt'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_has_a_row_with_its_problem(tmp_path, name):
    content, words = BAD[name]
    path = tmp_path / name
    path.write_bytes(content)
    row = inspect_files(path)
    assert (row.name, row.size, row.family, row.dtype, row.vae) == (
        name,
        len(content),
        None,
        "",
        None,
    )
    assert words in row.problem
    with pytest.raises(CheckpointError) as caught:
        format_inspection([path])
    assert str(caught.value) == row.problem


def test_a_missing_file_has_a_row_with_its_problem(tmp_path):
    missing = inspect_files(tmp_path / "gone.safetensors")
    assert (missing.size, missing.problem) == (0, f"{missing.path} does not exist; check the path")
    assert "is a folder" in inspect_files(tmp_path).problem
    assert "is not a path" in inspect_files(tmp_path / "a\0b.safetensors").problem
    link = tmp_path / "loop.safetensors"
    link.symlink_to(link)
    assert "cannot be read" in inspect_files(link).problem


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_an_unreadable_file_has_a_row_with_its_problem(tmp_path, state_of):
    path = write(tmp_path / "b.safetensors", state_of(1))
    path.chmod(0)
    assert "permission denied" in inspect_files(path).problem


def test_a_lora_is_named(tmp_path):
    path = write(tmp_path / "l.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(4, 4)})
    assert inspect_files(path).problem.startswith("l.safetensors is a LoRA; choose checkpoints of")


def test_values_that_cannot_be_averaged_are_a_problem(tmp_path, state_of):
    path = write(
        tmp_path / "q.safetensors", state_of(0) | {QUERY: torch.zeros(16, 16).to(torch.int8)}
    )
    row = inspect_files(path)
    assert row.family == "Stable Diffusion 1.x"
    assert "in a type that cannot be averaged" in row.problem


def test_inspection_of_full_size_files_is_quick(tmp_path):
    models = [full_size(tmp_path / f"{name}.safetensors", name) for name in ("one", "two", "three")]
    start = time.process_time()
    text = format_inspection(models)
    assert time.process_time() - start < len(models)
    lines = text.splitlines()
    assert lines[0].split() == ["file", "family", "size", "hash", "VAE", "type"]
    for line, path in zip(lines[1:4], models, strict=True):
        assert line.startswith(f"{path.name:17}  Stable Diffusion 1.x")
        assert "2.13 GB" in line
        assert line.endswith("  fp16")
    assert lines[5] == "354 layers: 282 in the UNet, 72 in the text encoder"
    assert lines[6] == "VAE: the same in all files"
    assert lines[-6] == "together, with ranks 80, 80, 80 in float16:"
    assert lines[-5] == "  hyper-model        2.13 GB"
    names = [line.split("  ")[1].strip() for line in lines[-4:]]
    assert names == ["LoRAs", "analysis on disk", "memory, about", "time"]
    preflight = run_preflight(recipe(models, Path("nowhere"), ranks=(80, 80, 80)))
    memory = estimate_merge(preflight).memory
    assert 2**30 < memory < 8 * 2**30


def test_one_file_is_described_without_an_estimate(files):
    text = format_inspection(files[:1])
    assert "together" not in text
    assert text.splitlines()[1].startswith("a.safetensors  Stable Diffusion 1.x")
