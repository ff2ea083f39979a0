"""What is known before the first tensor is read: refusals, warnings, sizes; quickly."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from sparse_checkpoints import full_size
from tiny_family import NORM, POSITION_IDS, QUERY, TEXT, UNET, merge, recipe, write

from hyper_merge.checkpoints.architectures.families import KINDS
from hyper_merge.checkpoints.reader import CheckpointReader
from hyper_merge.errors import (
    CheckpointError,
    DeviceError,
    FamilyError,
    HyperMergeError,
    MismatchError,
)
from hyper_merge.operations.merge import cost_model, estimate
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import Preflight, run_preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.runs.folders import Folders
from hyper_merge.runtime import throughput
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout, sdxl_layout

RANKS = (128, 64, 32, 16)


def checked(models, **settings):
    return run_preflight(recipe(models, Path("nowhere"), **settings))


def ranks_of(preflight):
    return plan_ranks(preflight.recipe, preflight.inputs).layer_ranks


def refused(models, **settings):
    with pytest.raises(HyperMergeError) as caught:
        checked(models, **settings)
    return str(caught.value)


@pytest.fixture
def b(tmp_path, state_of):
    """Writes b.safetensors from the state of b with some tensors changed, or left out (None)."""

    def make(name="b.safetensors", **changes):
        state = state_of(1) | {key.replace("/", "."): tensor for key, tensor in changes.items()}
        return write(tmp_path / name, {key: t for key, t in state.items() if t is not None})

    return make


@pytest.mark.parametrize("end", [".aria2", ".part", ".crdownload", ".!qB"])
def test_a_download_in_progress_is_refused(tmp_path, files, b, end):
    path = b()
    sign = path.with_name(path.name + end)
    sign.touch()
    with pytest.raises(CheckpointError) as refusal:
        checked([files[0], path])
    assert str(refusal.value) == (
        f"the download of b.safetensors is not finished: {sign.name} stands beside it; wait until it"
        f" ends or begin it again; if b.safetensors is complete, delete {sign.name} or set"
        " damaged to accept"
    )
    assert refusal.value.file == path
    with pytest.raises(CheckpointError, match=r"download of b\.safetensors is not"):
        checked([files[0], files[2]], base=str(path))
    accepted = checked([files[0], path], damaged="accept")
    assert f"the download of b.safetensors is not finished: {sign.name} stands beside it" in (
        accepted.warnings
    )
    sign.unlink()
    checked([files[0], path])


def test_a_file_shorter_than_its_header_says_is_refused(files, b):
    path = b()
    path.write_bytes(path.read_bytes()[:-100])
    assert "b.safetensors is truncated" in refused([files[0], path])


def test_no_tensor_is_read(files, monkeypatch):
    monkeypatch.setattr(
        CheckpointReader, "__enter__", lambda self: pytest.fail("a file was opened")
    )
    preflight = checked(files)
    assert preflight.warnings == ()
    assert len(ranks_of(preflight)) == len(preflight.inputs.layout.layers)


def test_the_estimate_is_the_size_of_the_files(files, merged):
    takes = estimate_merge(checked(files))
    assert estimate_merge(checked(files, allocation="even")).loras == takes.loras
    hyper_model = merged.place.hyper_model.stat().st_size
    loras = sum(path.stat().st_size for path in merged.loras)
    cache = merged.place.folder.parent / "cache"
    analysis = sum(path.stat().st_size for path in cache.glob("*.safetensors"))
    assert takes.average == pytest.approx(hyper_model, abs=40_000)  # less their headers
    # Adaptive ranks take no more, and nearly all of it in layers of usual sizes.
    assert 0.8 * takes.loras < loras < takes.loras + 60_000
    assert takes.analysis == pytest.approx(analysis, rel=0.1)  # widths follow the tensors
    assert takes.disk == takes.average + takes.loras + takes.analysis
    assert estimate_merge(checked(files[1:], base=str(files[0]))).average == 0


@pytest.mark.parametrize(
    ("rate", "took"),
    [
        (1.3e11, 1093),  # idle
        (2.2e11, 390),  # busy: half of its processor seconds
    ],
)
def test_the_expected_time_is_that_of_the_benchmark(tmp_path, monkeypatch, rate, took):
    """Two machines on which `benchmarks/phases.py` ran at the default settings."""
    monkeypatch.setattr(throughput, "measure_throughput", lambda device: rate)
    expected = estimate_merge(checked(full_size_family(tmp_path), ranks=RANKS))
    assert took / 1.5 < expected.seconds < took * 1.5


@pytest.mark.parametrize(
    ("layout", "count", "most"),
    [(sd1_layout, 4, 2.5e9), (sd1_layout, 8, 2.5e9), (sdxl_layout, 8, 4e9)],
)
def test_the_expected_memory_grows_with_neither_layers_nor_ranks(
    tmp_path, monkeypatch, layout, count, most
):
    monkeypatch.setattr(throughput, "measure_throughput", lambda device: 1.3e11)
    models = [full_size(tmp_path / f"{c}.safetensors", str(c), layout) for c in range(count)]
    usual, large = (
        estimate_merge(checked(models, ranks=ranks)).memory for ranks in (RANKS, (256, 128))
    )
    assert 1.4e9 < usual < most
    assert large < 1.2 * usual


def test_the_expected_memory_is_that_of_the_benchmark(tmp_path, monkeypatch):
    """Four files of half the width, as `benchmarks/estimates.py` makes and merges them."""
    monkeypatch.setattr(throughput, "measure_throughput", lambda device: 1.3e11)
    layout = partial(sd1_layout, width=160, context=384)
    models = [full_size(tmp_path / f"{c}.safetensors", c, layout) for c in "abcd"]
    expected = estimate_merge(checked(models, ranks=(64, 32, 16, 8)))
    assert expected.memory == pytest.approx(1.13e9, rel=0.2)


def test_other_ranks_are_expected_sooner(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "measure_throughput", lambda device: 1.3e11)
    models = full_size_family(tmp_path)
    first = estimate_merge(checked(models, ranks=RANKS))
    monkeypatch.setattr(estimate, "find_analysis", lambda *question: tmp_path)
    monkeypatch.setattr(Folders, "hyper_model_for", lambda *question: tmp_path)
    monkeypatch.setattr(cost_model, "bytes_to_hash", lambda *question: 0)
    monkeypatch.setattr(Preflight, "is_network_known", True)
    again = estimate_merge(checked(models, ranks=(96, 48, 24)))
    assert again.seconds < first.seconds / 3
    even = estimate_merge(checked(models, ranks=RANKS, allocation="even"))
    assert even.seconds < first.seconds / 3


def full_size_family(folder):
    return [full_size(folder / f"{c}.safetensors", c) for c in "abcd"]


def test_the_estimate_omits_what_the_cache_saves(files, started):
    def seconds(**settings):
        return estimate_merge(run_preflight(recipe(files, started, **settings))).seconds

    cached = seconds(ranks=(5,))
    assert cached < seconds(ranks=(5,), vae="average")  # another average and analysis
    (started / "Stable-diffusion/mix.safetensors").unlink()
    averaging = seconds(ranks=(5,))
    shutil.rmtree(started / "hyper-merge/cache")
    analysing = seconds(ranks=(5,))
    assert cached < averaging < analysing
    elsewhere = run_preflight(recipe(files, started, ranks=(5,)), Folders.under(started / "none"))
    assert estimate_merge(elsewhere).seconds == analysing


def test_one_file_given_twice_is_refused(files, tmp_path):
    # A copy: a link to one that all tests share would change what its deletion frees.
    a = Path(shutil.copy(files[0], tmp_path / "a.safetensors"))
    assert refused([a, files[1], a]) == f"{a} is given twice; choose every checkpoint once"
    for name in ("soft.safetensors", "hard.safetensors"):
        link = tmp_path / name
        link.symlink_to(a) if name.startswith("soft") else link.hardlink_to(a)
        assert (
            refused([a, link]) == f"{a} and {link} are the same file; choose every checkpoint once"
        )


def test_the_same_content_twice_is_a_warning(files, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    warnings = checked([files[0], copy, files[1]]).warnings
    assert warnings == ("a.safetensors and copy.safetensors have the same content",)


def test_two_files_of_one_name_are_refused(files, tmp_path, state_of):
    other = write(tmp_path / "a.ckpt", state_of(1))
    assert refused([files[0], other]) == (
        f"{files[0]} and {other} have the same name 'a', by which multipliers are listed;"
        " rename one of them"
    )


def test_missing_keys_are_counted_and_both_files_named(files, b):
    path = b(**{QUERY.replace(".", "/"): None, NORM.replace(".", "/"): None})
    message = refused([files[0], path])
    assert message.startswith("b.safetensors lacks 2 of a.safetensors' 90 keys")
    assert f"(first: {NORM})" in message or f"(first: {QUERY})" in message
    assert message.endswith("; choose checkpoints of one family")


def test_extra_keys_are_counted_and_both_files_named(files, b):
    assert refused([files[0], b(**{f"{UNET}extra.weight": torch.ones(2)})]) == (
        "b.safetensors has 1 key that a.safetensors lacks"
        f" (first: {UNET}extra.weight); choose checkpoints of one family"
    )


def test_other_shapes_are_counted_and_both_files_named(files, b):
    key = f"{TEXT}embeddings.token_embedding.weight"
    assert refused([files[0], b(**{key: torch.zeros(22, 24)})]) == (
        f"b.safetensors and a.safetensors differ in shape in 1 key (first: {key}"
        " [22, 24] against [20, 24]); choose checkpoints of one family"
    )


def test_a_base_must_go_with_the_others(files, b):
    base = b("base.safetensors", **{NORM: None})
    assert "base.safetensors lacks 1 of a.safetensors'" in refused(files, base=str(base))


def test_tensors_that_are_not_averaged_may_differ(files, b):
    path = b(**{"model_ema.decay": torch.zeros(1), POSITION_IDS: torch.zeros(1, 77)})
    assert checked([files[0], path]).warnings == ()


def test_mixed_families_are_counted_and_named(files, b):
    first = f"{UNET}input_blocks.0.0.weight"
    path = b("paint.safetensors", **{first: torch.zeros(16, 9, 3, 3).half()})
    assert refused([*files[:2], path]) == (
        "2 are Stable Diffusion 1.x, 1 is Stable Diffusion 1.x inpainting: a.safetensors,"
        " b.safetensors / paint.safetensors; choose checkpoints of one family"
    )


def test_a_family_that_cannot_be_merged_is_named(b):
    first = f"{UNET}input_blocks.0.0.weight"
    models = [b(f"{n}.safetensors", **{first: torch.zeros(16, 5, 3, 3).half()}) for n in "pq"]
    with pytest.raises(FamilyError, match=r"p\.safetensors is of no architecture"):
        checked(models)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ({"lora_unet_x.lora_up.weight": 1}, "a LoRA"),
        ({"encoder.conv_in.weight": 1, "decoder.conv_in.weight": 1}, "a VAE alone"),
        ({"emb_params": 1}, "a textual-inversion embedding"),
        ({f"{UNET}input_blocks.0.0.weight": 1}, "a UNet alone of a kind that cannot be recognised"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_than_checkpoints_are_named(files, tmp_path, state, kind):
    tensors = {key: torch.zeros(4, 4, 3, 3) for key in state}
    path = write(tmp_path / "odd.safetensors", tensors)
    assert refused([files[0], path]) == (
        f"odd.safetensors is {kind}; choose checkpoints of {KINDS}"
    )


def test_ranks_beyond_a_layer_are_capped(files, tmp_path):
    assert checked(files, ranks=(40, 2)).warnings == ()  # adaptive ranks have no such meaning
    preflight = checked(files, ranks=(40, 2), allocation="even")
    assert len(preflight.warnings) == 1
    assert preflight.warnings[0].startswith("rank 40 is capped in ")
    for layer, ranks in zip(preflight.inputs.layout.layers, ranks_of(preflight), strict=True):
        assert ranks == ((0, 0) if layer.is_end else (min(40, layer.m, layer.n), 2))
    layers = preflight.inputs.layout.without_ends().layers
    affected = sum(min(layer.m, layer.n) < 40 for layer in layers)
    smallest = min(min(layer.m, layer.n) for layer in layers)
    assert preflight.warnings[0].endswith(f" {affected} layers, the smallest has {smallest}")
    assert checked(files, ranks=(smallest,), allocation="even").warnings == ()
    assert merge(files, tmp_path, ranks=(40, 2)).report.loss < 0.5


def test_absent_cuda_device_is_refused(files, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError):
        checked(files, device="cuda")


def test_average_id_follows_the_average(files):
    ids = [
        checked(files, **settings).average_id
        for settings in (
            {},
            {"ranks": (7,), "seed": 3, "name": "other"},
            {"weights": (2, 2, 2)},
            {"weights": (1, 2, 1)},
            {"dtype": "float32"},
            {"vae": "average"},
        )
    ] + [checked(files[::-1]).average_id, checked(files[1:], base=str(files[0])).average_id]
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == len(ids) - 2


def test_a_mismatch_is_its_own_kind_of_error(files, b):
    with pytest.raises(MismatchError):
        checked([files[0], b(**{QUERY: None})])
