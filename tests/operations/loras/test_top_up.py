"""What shared LoRAs leave of a fitted LoRA becomes a private one, as dense decompositions have it."""

import shutil

import numpy as np
import pytest
import torch
from lora_files import (
    METADATA,
    SHAPES,
    dense,
    distance,
    energy,
    factors,
    kohya,
    share,
    write,
    write_lora,
    write_related,
)
from safetensors.torch import load_file
from tiny_family import snapshot, temporaries

from hyper_merge.analysis.loss_weights import layer_factors
from hyper_merge.errors import InterruptedRun, NameTakenError, OutputError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.operations.loras.fit_text import format_lora_fit
from hyper_merge.operations.loras.known_layers import known_family
from hyper_merge.recipe.request import key_place
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders, metadata_of
from hyper_merge.runs.integrity import require_own
from hyper_merge.runs.lora_runs import load_lora_run
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import name_key
from hyper_merge.runtime.progress import Progress


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A models folder with the run mix; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    share(write_related(folder), folder / "models")
    return folder / "models"


@pytest.fixture
def root(made, tmp_path):
    return shutil.copytree(made, tmp_path / "models")


@pytest.fixture
def new(tmp_path):
    """A LoRA of which the run explains a part, in some layers less than in others."""
    first = factors(4, 100)
    own = factors(3, 55, size=0.014)
    pairs = {
        name: (
            np.concatenate([first[name][0], own[name][0] * (0.3 + 0.4 * place)], 1),
            np.concatenate([first[name][1], own[name][1]]),
        )
        for place, name in enumerate(SHAPES)
    }
    return write(tmp_path / "new.safetensors", kohya(pairs, 7))


def fit(root, path, progress=None, **settings):
    request = FitRequest.parse({"run": "mix", "checkpoint": path, **settings}, key_place)
    return run_lora_fit(request, Folders.under(root), progress or Progress())


def run_of(root):
    return load_lora_run(Folders.under(root), "mix")


def rest_of(root, path, row):
    """Returns what the shared LoRAs leave, by module, from the files on disk."""
    rest = dense(path)
    for place, lora in enumerate(run_of(root).report.loras):
        for module, change in dense(root / f"Lora/{lora}.safetensors").items():
            x = row.multipliers_of("text_encoder" if "lora_te" in module else "unet")[place]
            rest[module] = rest[module] - x * change
    return rest


def tails(rest, ranks):
    """Returns the least squared error that factors of these ranks leave."""
    values = {name: np.linalg.svd(matrix, compute_uv=False) for name, matrix in rest.items()}
    return sum(float((values[name][ranks.get(name, 0) :] ** 2).sum()) for name in values)


def ranks_in(path):
    return {
        key.removesuffix(".lora_down.weight"): len(tensor)
        for key, tensor in load_file(path).items()
        if key.endswith(".lora_down.weight")
    }


def test_it_is_the_best_of_its_ranks_and_beats_even_ones(root, new):
    record = fit(root, new, topup="2")
    (private,) = record.topups
    path = root / f"Lora/{private.name}.safetensors"
    assert private.name == "mix_fit-new-2"
    rest, ranks = rest_of(root, new, record.row), ranks_in(path)
    left = distance(rest, dense(path))
    assert left == pytest.approx(tails(rest, ranks), rel=1e-4)
    assert left < 0.9 * tails(rest, dict.fromkeys(SHAPES, 2))
    sides = {name: shape[0] + int(np.prod(shape[1:])) for name, shape in SHAPES.items()}
    spent = sum(rank * sides[name] for name, rank in ranks.items())
    assert spent <= 2 * sum(sides.values())
    assert private.explained == pytest.approx(1 - left / energy(dense(new)), abs=1e-6)
    assert private.fidelity == pytest.approx(private.explained)  # plain squares
    assert record.row.explained < private.explained < 1
    assert (private.size, private.rank) == (path.stat().st_size, 2)


@pytest.mark.parametrize("weights", ["plain", "layout"])
def test_a_share_is_reached_and_barely_exceeded(tmp_path, new, weights):
    root = tmp_path / "models"
    share(write_related(tmp_path, count=3), root, layer_weights=weights)
    record = fit(root, new, topup="97%")
    (private,) = record.topups
    layers = {layer.module: layer for layer in known_family("sd1").layers}
    chosen = [layers[name] for name in SHAPES]
    sizes = torch.tensor([layer.m for layer in chosen], dtype=torch.float64)
    scales = dict(zip(SHAPES, layer_factors(weights, sizes, chosen).sqrt().tolist(), strict=True))
    rest, held = rest_of(root, new, record.row), dense(root / f"Lora/{private.name}.safetensors")

    def weighted(changes):
        return {name: scales[name] * change for name, change in changes.items()}

    whole = energy(weighted(dense(new)))
    explained = 1 - distance(weighted(rest), weighted(held)) / whole
    assert private.fidelity == pytest.approx(explained, abs=1e-6)
    assert 0.97 <= explained < 0.98
    assert private.explained == pytest.approx(
        1 - distance(rest, held) / energy(dense(new)), abs=1e-6
    )


def test_it_is_reported_and_named_in_the_prompt(root, new):
    record = fit(root, new, topup="2")
    run = run_of(root)
    text = format_lora_fit(record, run)
    size = format_size(record.topups[0].size)
    assert f"with the top-up mix_fit-new-2 (rank 2, {size}): " in text
    assert (root / "hyper-merge/mix/fits/new.txt").read_text() == text
    assert parse_tags(record.tags(run))[-1].name == "mix_fit-new-2"
    assert load_fits(run) == ((record,), ())
    assert (root / "Lora/mix_fit-new-2.png").exists()
    assert "what the shared LoRAs of mix leave of it" in (
        root / "Lora/mix_fit-new-2.json"
    ).read_text(encoding="utf-8")
    require_own(run, [root / "Lora/mix_fit-new-2.safetensors"], Progress())


def test_what_needs_none_gets_none(root, new, tmp_path):
    share_reached = f"{100 * fit(root, new, name='first').row.fidelity - 1:.0f}%"
    assert fit(root, new, topup=share_reached).topups == ()
    zero = write(tmp_path / "zero.safetensors", kohya(factors(2, 1, size=0.0)))
    assert fit(root, zero, topup="4", damaged="accept").topups == ()
    assert not list((root / "Lora").glob("*_fit-*"))


def test_whole_matrices_are_cut_down_too(root, tmp_path):
    generator = torch.Generator().manual_seed(3)
    name = next(iter(SHAPES))
    state = {f"{name}.diff": 0.01 * torch.randn(SHAPES[name], generator=generator)}
    path = write(tmp_path / "full.safetensors", state)
    record = fit(root, path, topup="90%")
    ranks = ranks_in(root / f"Lora/{record.topups[0].name}.safetensors")
    assert record.topups[0].explained >= 0.9
    assert 60 < ranks[name] < 320


def test_layers_that_go_together_are_together(tmp_path):
    layers = known_family("sd2").layers
    bundle = next(layer.bundle for layer in layers if layer.bundle)
    first, *others = (layer for layer in layers if layer.bundle == bundle)
    paths = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        state = {
            f"{first.module}.lora_up.weight": torch.randn(first.up_shape(2), generator=generator),
            f"{first.module}.lora_down.weight": torch.randn(
                first.down_shape(2), generator=generator
            ),
        }
        path = tmp_path / f"{seed}.safetensors"
        paths.append(write(path, {k: 0.02 * x for k, x in state.items()}, {"ss_v2": "True"}))
    root = tmp_path / "models"
    share(paths[:2], root, ranks=(1,))
    record = fit(root, paths[2], topup="1")
    ranks = ranks_in(root / f"Lora/{record.topups[0].name}.safetensors")
    assert ranks.keys() == {first.module, *(layer.module for layer in others)}


def test_an_earlier_fit_stays_unless_overwriting_is_allowed(root, new):
    fit(root, new, topup="2")
    before = snapshot(root)
    for settings in ({}, {"topup": "2"}, {"topup": "3"}):
        with pytest.raises(OutputError, match=r"new\.json exists;"):
            fit(root, new, **settings)
    assert snapshot(root) == before
    fit(root, new, topup="3", overwrite=True)
    assert [x.name for x in sorted((root / "Lora").glob("mix_fit*.safetensors"))] == [
        "mix_fit-new-3.safetensors"
    ]
    fit(root, new, overwrite=True)
    assert not list((root / "Lora").glob("mix_fit*"))


def test_somebody_elses_lora_of_its_name_stays(root, new):
    shutil.copy(new, root / "Lora/mix_fit-new-7.safetensors")
    before = snapshot(root)
    for overwrite in (False, True):
        with pytest.raises(NameTakenError, match=r"mix_fit-new-7\.safetensors exists already"):
            fit(root, new, topup="2", overwrite=overwrite)
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "names", [("v2 (a)", "v2 [a]"), ("写实人像_v2", "动漫风_v2"), ("x" * 60 + "a", "x" * 60 + "b")]
)
def test_names_alike_have_loras_of_their_own(root, tmp_path, names):
    made = []
    for seed, name in enumerate(names):
        path = write_lora(tmp_path / f"{name}.safetensors", 60 + seed)
        made.append(fit(root, path, topup="1").topups[0].name)
        again = fit(root, path, topup="1", overwrite=True).topups[0].name
        assert again == made[-1]
    assert len({name_key(name) for name in made}) == 2
    assert load_fits(run_of(root))[1] == ()


def test_the_name_of_another_input_is_not_taken(root, tmp_path):
    path = write_lora(tmp_path / "lora1.safetensors", 70)
    with pytest.raises(NameTakenError, match="lora1 is another LoRA of the run mix"):
        fit(root, path)


def test_the_file_that_is_read_is_not_replaced(root, new):
    name = fit(root, new, topup="2").topups[0].name
    path = root / f"Lora/{name}.safetensors"
    before = path.read_bytes()
    with pytest.raises(OutputError, match="is one of the files that are read"):
        fit(root, path, name="new", topup="2", overwrite=True)
    assert path.read_bytes() == before


def test_it_goes_with_its_run_but_not_if_another_was_made_of_it(root, new, tmp_path):
    name = fit(root, new, topup="2").topups[0].name
    lora = root / f"Lora/{name}.safetensors"
    assert {lora, lora.with_suffix(".png")} <= set(files_of(run_of(root), Folders.under(root)))
    share([lora, write_lora(tmp_path / "other.safetensors", 9)], root, name="later", ranks=(1,))
    delete_run(run_of(root), Folders.under(root))
    left = {path.name for path in (root / "Lora").iterdir() if path.name.startswith("mix")}
    assert left == {f"{name}{suffix}" for suffix in (".safetensors", ".json", ".png")}
    assert not (root / "hyper-merge/mix").exists()


def test_a_stop_at_any_step_leaves_nothing(root, new):
    before, fractions = snapshot(root), []
    for fraction in (0.1, 0.4, 0.6, 0.8):
        at_now = [0.0]

        def on_progress(_phase, now, at_now=at_now):
            at_now[0] = now

        def should_stop(at_now=at_now, fraction=fraction):
            return at_now[0] >= fraction

        with pytest.raises(InterruptedRun):
            fit(root, new, Progress(on_progress, should_stop), topup="3")
        fractions.append(at_now[0])
        assert snapshot(root) == before
        assert temporaries(root) == []
    assert max(fractions) < 1


def test_the_base_is_that_of_the_shared_loras(tmp_path):
    known = {**METADATA, "ss_sd_model_name": "painter.safetensors"}
    paths = [
        write(tmp_path / f"{seed}.safetensors", kohya(factors(2, seed), 2), known)
        for seed in range(3)
    ]
    root = tmp_path / "models"
    share(paths[:2], root, ranks=(1,))
    name = fit(root, paths[2], topup="1").topups[0].name
    metadata = metadata_of(root / f"Lora/{name}.safetensors")
    assert metadata["ss_sd_model_name"] == "painter.safetensors"
    assert (metadata["hyper_merge.run"], metadata["hyper_merge.checkpoint"]) == ("mix", "2")
