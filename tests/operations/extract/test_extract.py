"""Extraction: a LoRA that turns one checkpoint into another, as well as its rank can."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_family import (
    NORM,
    QUERY,
    TINY,
    VAE,
    WarningLog,
    added,
    layers_of,
    load,
    snapshot,
    write,
    write_unfinished,
)

from hyper_merge.errors import (
    CheckpointError,
    DeviceError,
    ExtractionError,
    InterruptedRun,
    MismatchError,
    NameTakenError,
    NonFiniteError,
    OutputError,
    RecipeError,
)
from hyper_merge.operations.extract import difference
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.operations.extract.text import format_extraction
from hyper_merge.recipe.request import key_place
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import write_family

RANK = 5


def extract(base, checkpoint, output, progress=None, **settings):
    files = {"base": base, "checkpoint": checkpoint, "output": output}
    request = ExtractRequest.parse({**files, "rank": RANK, **settings}, key_place)
    return run_extract(request, None, progress or Progress())


def weight(state, layer):
    """Returns a layer of a checkpoint as a matrix."""
    rows = slice(*layer.rows) if layer.rows else slice(None)
    return state[layer.key][rows].double().reshape(layer.m, layer.n)


def errors_of(base, checkpoint, lora, fused=None):
    """Returns squared norms of difference and error, and the singular tail, by layer."""
    one, other = load(base), load(checkpoint)
    rows = []
    for layer in layers_of(base):
        if fused and not layer.rows:
            continue
        delta = weight(other, layer) - weight(one, layer)
        left = delta - added(lora, layer.module)
        tail = torch.linalg.svdvals(delta)[RANK:]
        rows.append([float(part.square().sum()) for part in (delta, left, tail)])
    return torch.tensor(rows).double()


def metadata(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.fixture(scope="module")
def extracted(files, tmp_path_factory):
    """The extraction from a to b in each type."""
    folder = tmp_path_factory.mktemp("extracted")
    return {
        dtype: extract(files[0], files[1], folder / dtype, dtype=dtype)
        for dtype in ("float16", "bfloat16", "float32")
    }


def test_base_plus_lora_is_the_best_of_its_rank(files, extracted):
    details = errors_of(*files[:2], load_file(extracted["float32"].path))
    torch.testing.assert_close(details[:, 1], details[:, 2], rtol=1e-3, atol=1e-9)
    assert bool((details[:, 2] > 0).any())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_reported_shares_are_those_of_the_written_file(files, extracted, dtype):
    report = extracted[dtype]
    tensors = load_file(report.path)
    assert {t.dtype for key, t in tensors.items() if "alpha" not in key} == {getattr(torch, dtype)}
    details = errors_of(*files[:2], tensors)
    parts = [layer.part for layer in layers_of(files[0])]
    for which, share in (
        ("unet", report.parts["unet"]),
        ("text_encoder", report.parts["text_encoder"]),
    ):
        of = details[torch.tensor([part == which for part in parts])].sum(0)
        assert share == pytest.approx(1 - float(of[1] / of[0]), abs=1e-6)
    assert report.explained == pytest.approx(
        1 - float(details[:, 1].sum() / details[:, 0].sum()), abs=1e-6
    )
    assert report.size == report.path.stat().st_size
    assert report.layers == len(parts)


def test_the_share_not_carried_is_reported_by_kind(files, extracted):
    one, other = load(files[0]), load(files[1])
    keys = {layer.key for layer in layers_of(files[0])}
    energy = {
        key: float((other[key].double() - one[key].double()).square().sum())
        for key in one
        if one[key].is_floating_point()
    }
    outside = extracted["float16"].not_carried
    total = sum(energy.values())
    carried = sum(energy[key] for key in keys)
    assert sum(outside.values()) == pytest.approx(1 - carried / total, rel=1e-4)
    vae = sum(e for key, e in energy.items() if key.startswith("first_stage_model."))
    assert outside["VAE"] == pytest.approx(vae / total, rel=1e-4)
    assert outside["norms"] > 0
    line = format_extraction(extracted["float16"])
    assert f"VAE {outside['VAE']:.3%}" in line
    assert line.endswith("load a and put this into the prompt:\n<lora:b-from-a:1.00000>")


def test_a_planted_difference_of_the_rank_comes_back_exactly(files, tmp_path, state_of):
    base = state_of(0, torch.float32)
    generator = torch.Generator().manual_seed(1)
    changed = dict(base)
    for key in {layer.key for layer in layers_of(files[0])}:
        rows = base[key].flatten(1)
        step = torch.randn(len(rows), 2, generator=generator) @ torch.randn(
            2, rows.shape[1], generator=generator
        )
        changed[key] = base[key] + 0.1 * step.view(base[key].shape)
    paths = [write(tmp_path / f"{n}.safetensors", s) for n, s in (("one", base), ("two", changed))]
    report = extract(*paths, tmp_path, dtype="float32")
    assert report.explained == pytest.approx(1, abs=1e-6)
    lora = load_file(report.path)
    for layer in layers_of(paths[0]):
        restored = weight(base, layer) + added(lora, layer.module)
        torch.testing.assert_close(restored, weight(changed, layer), rtol=0, atol=1e-5)


def test_only_layers_that_differ_are_in_the_file(tmp_path, state_of):
    base = state_of(0)
    changed = {**base, QUERY: state_of(1)[QUERY]}
    paths = [write(tmp_path / f"{n}.safetensors", s) for n, s in (("one", base), ("two", changed))]
    report = extract(*paths, tmp_path)
    modules = {key.partition(".")[0] for key in load_file(report.path)}
    assert modules == {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"}
    assert (report.layers, [*report.parts]) == (1, ["unet"])
    assert sum(report.not_carried.values()) == 0


@pytest.fixture(scope="module")
def second_family(tmp_path_factory):
    spec = replace(TINY, architecture="sd2", count=2)
    return write_family(tmp_path_factory.mktemp("sd2"), spec, ("x", "y"))


def test_the_thirds_of_a_fused_attention_are_separate_layers(second_family, tmp_path):
    report = extract(*second_family, tmp_path, dtype="float32")
    details = errors_of(*second_family, load_file(report.path), fused=True)
    assert len(details) == 3 * 23
    torch.testing.assert_close(details[:, 1], details[:, 2], rtol=1e-3, atol=1e-9)


def test_a_fused_attention_is_written_whole_or_never(second_family, tmp_path):
    base, other = load(second_family[0]), load(second_family[1])
    key = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    changed = {**base, key: base[key].clone()}
    third = len(base[key]) // 3
    changed[key][third : 2 * third] = other[key][third : 2 * third]
    paths = [write(tmp_path / f"{n}.safetensors", s) for n, s in (("one", base), ("two", changed))]
    tensors = load_file(extract(*paths, tmp_path).path)
    attention = "lora_te_text_model_encoder_layers_0_self_attn_"
    names = [f"{attention}{word}" for word in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert {name.partition(".")[0] for name in tensors} == set(names)
    assert [float(added(tensors, name).norm()) > 0 for name in names] == [False, True, False, False]


def test_the_file_says_what_it_turns_into_what(files, extracted):
    path = extracted["float16"].path
    assert path.name == "b-from-a.safetensors"
    details = metadata(path)
    assert details["hyper_merge.kind"] == "lora-alone"
    assert (details["hyper_merge.name"], details["hyper_merge.checkpoint"]) == ("a", "b")
    assert details["ss_output_name"] == "b-from-a"
    assert details["ss_sd_model_name"] == "a.safetensors"
    assert (details["ss_network_dim"], details["ss_network_alpha"]) == (str(RANK), f"{RANK}.0")
    assert json.loads(details["hyper_merge.multipliers"]) == {"b": 1.0}
    assert float(details["hyper_merge.explained"]) == extracted["float16"].explained
    assert [s["name"] for s in json.loads(details["hyper_merge.lineage"])] == [
        "a.safetensors",
        "b.safetensors",
    ]
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["description"] == f"Turns a into b, by itself; rank {RANK}."
    assert card["notes"] == "b: <lora:b-from-a:1.00000>"
    assert path.with_suffix(".png").exists()


def test_the_same_request_gives_the_same_tensors(files, extracted, tmp_path):
    again = load_file(extract(files[0], files[1], tmp_path).path)
    first = load_file(extracted["float16"].path)
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_a_path_names_a_file_in_either_suffix_case(tmp_path, state_of):
    paths = [write(tmp_path / f"{n}.ckpt", state_of(c)) for c, n in enumerate(("one", "two"))]
    report = extract(*paths, tmp_path / "loras" / "mine.safetensors")
    assert report.path == tmp_path / "loras" / "mine.safetensors"
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "mine.json", "mine.png", "mine.safetensors", "one.ckpt", "two.ckpt",
    ]  # fmt: skip
    assert 0 < report.explained < 1


def test_letters_that_prompts_misread_are_replaced_in_the_name(tmp_path, state_of):
    paths = [
        write(tmp_path / f"{n}.safetensors", state_of(c)) for c, n in enumerate(("a [1]", "b__<x>"))
    ]
    assert extract(*paths, tmp_path).path.name == "b_-x--from-a -1.safetensors"


def test_equal_checkpoints_are_refused_with_nothing_written(files, tmp_path, state_of):
    same = write(tmp_path / "same.safetensors", state_of(0))
    before, warnings = snapshot(tmp_path), []
    message = (
        "a.safetensors and same.safetensors do not differ in any layer that a LoRA can hold; there is"
        " nothing to extract"
    )
    with pytest.raises(ExtractionError, match=f"^{re.escape(message)}$"):
        extract(files[0], same, tmp_path, Progress(warn=warnings.append))
    assert warnings == ["a.safetensors and same.safetensors have the same content"]
    other = write(tmp_path / "vae.safetensors", {**state_of(0), VAE: state_of(1)[VAE]})
    with pytest.raises(
        ExtractionError, match="hold, only in their VAE; there is nothing to extract"
    ):
        extract(files[0], other, tmp_path)
    other.unlink()
    assert snapshot(tmp_path) == before


def test_a_file_twice_or_another_family_is_refused(files, second_family, tmp_path):
    with pytest.raises(MismatchError, match="is given twice; choose every checkpoint once"):
        extract(files[0], files[0], tmp_path)
    with pytest.raises(MismatchError, match=r"1 is Stable Diffusion 1\.x, 1 is Stable Diffusion 2"):
        extract(files[0], second_family[0], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_download_is_not_extracted(files, tmp_path):
    spoilt = write_unfinished(tmp_path / "spoilt.safetensors", files[1], 0.6)
    for pair in ((files[0], spoilt), (spoilt, files[0])):
        with pytest.raises(CheckpointError, match=r"spoilt\.safetensors lacks data"):
            extract(*pair, tmp_path / "models")
    sign = files[1].with_name(files[1].name + ".part")
    try:
        sign.touch()
        with pytest.raises(
            CheckpointError, match=r"the download of b\.safetensors is not finished"
        ):
            extract(files[0], files[1], tmp_path / "models")
        assert not (tmp_path / "models" / "Lora").exists()
        log = WarningLog()
        extract(files[0], files[1], tmp_path / "models", log.progress, damaged="accept")
    finally:
        sign.unlink()
    assert log.warnings == [
        f"the download of b.safetensors is not finished: {sign.name} stands beside it"
    ]
    log = WarningLog()
    extract(files[0], spoilt, tmp_path / "models", log.progress, damaged="accept")
    assert log.warnings[0].startswith("spoilt.safetensors holds one value throughout ")


def test_nan_is_refused_by_file_and_key(files, tmp_path, state_of):
    for key in (QUERY, NORM):
        state = state_of(1)
        state[key] = torch.full_like(state[key], float("nan"))
        spoilt = write(tmp_path / "spoilt.safetensors", state)
        with pytest.raises(
            NonFiniteError, match=rf"spoilt.safetensors holds NaN .* of {re.escape(key)};"
        ):
            extract(files[0], spoilt, tmp_path / "models")
    assert not (tmp_path / "models" / "Lora").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, 'key "rank": expected a whole number from 1 to 4096, got the number 0'),
        ({"rank": 2.5}, 'key "rank": expected a whole number from 1 to 4096, got the number 2.5'),
        ({"name": "a<b"}, 'key "name": the character "<" is not allowed'),
        ({"dtype": "fp16"}, 'key "dtype": expected one of float16, bfloat16, float32, got "fp16"'),
        ({"device": "gpu"}, 'key "device": expected auto, cpu, cuda or cuda:N, got "gpu"'),
        ({"output": "a/x_.safetensors"}, 'key "output": x_.safetensors is the LoRA\'s name in prompts: '),
        ({"output": "a/x.safetensors", "name": "y"}, 'key "name": a/x.safetensors has a name already;'),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_refused(files, tmp_path, settings, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        extract(files[0], files[1], **{"output": tmp_path, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_refused(files, tmp_path):
    with pytest.raises(DeviceError, match="device cuda was asked for, but torch finds no CUDA"):
        extract(files[0], files[1], tmp_path, device="cuda")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".json", ".png"])
def test_a_taken_name_is_refused_unless_overwriting_is_allowed(files, tmp_path, suffix):
    place = tmp_path / "Lora" / f"b-from-a{suffix}"
    place.parent.mkdir()
    place.write_bytes(b"mine")
    with pytest.raises(
        OutputError, match=f"b-from-a{suffix} exists; choose another name, or --over"
    ):
        extract(files[0], files[1], tmp_path)
    assert snapshot(tmp_path) == {f"Lora/b-from-a{suffix}": b"mine"}
    assert extract(files[0], files[1], tmp_path, overwrite=True).path.stat().st_size > 1000
    assert place.read_bytes() != b"mine"


def test_the_name_of_a_runs_missing_lora_is_refused(files, started):
    (started / "Lora/mix_1-2.safetensors").unlink()
    with pytest.raises(
        NameTakenError, match="mix_1-2 is a LoRA of the run mix; choose another name"
    ):
        extract(files[0], files[1], started, name="mix_1-2", overwrite=True)


def test_a_checkpoint_is_never_overwritten(tmp_path, state_of):
    paths = [
        write(tmp_path / f"{n}.safetensors", state_of(c)) for c, n in enumerate(("one", "two"))
    ]
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="is one of the files that are read; choose another name"):
        extract(*paths, paths[1], overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("phase", ["hashing", "reading and extracting", "writing"])
def test_an_interrupt_at_any_moment_leaves_nothing(files, tmp_path, phase):
    messages = []

    def stop():
        return bool(messages) and messages[-1].startswith(phase)

    progress = Progress(lambda words, _fraction: messages.append(words), stop)
    with pytest.raises(InterruptedRun):
        extract(files[0], files[1], tmp_path, progress)
    assert snapshot(tmp_path) == {}
    assert not (tmp_path / "Lora").exists()


def test_progress_never_falls_and_ends_at_one(files, tmp_path):
    fractions = []
    extract(
        files[0], files[1], tmp_path, Progress(lambda _phase, fraction: fractions.append(fraction))
    )
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_the_cpu_takes_layers_too_large_for_the_device(files, tmp_path, monkeypatch, extracted):
    original, failed = difference._differing_layers, []

    def fails_once(*arguments):
        if not failed:
            failed.append(arguments[1])
            raise torch.cuda.OutOfMemoryError
        return original(*arguments)

    monkeypatch.setattr(difference, "_differing_layers", fails_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    details = load_file(extract(files[0], files[1], tmp_path).path)
    first = load_file(extracted["float16"].path)
    assert failed
    assert all(torch.equal(details[key], first[key]) for key in first)


def test_a_file_instead_of_a_folder_is_refused_first(files, tmp_path):
    (tmp_path / "file").write_text("mine")

    def reading(phase, fraction):
        pytest.fail(f"{phase} began")

    for output in ("file", "file/x.safetensors", "file/deep/x.safetensors"):
        request = ExtractRequest(*files[:2], rank=4, output=tmp_path / output, device="cpu")
        with pytest.raises(OutputError, match=r"cannot write .*file is a file; choose an"):
            run_extract(request, None, Progress(on_progress=reading))
    assert snapshot(tmp_path) == {"file": b"mine"}
