"""Shared LoRAs stand for their inputs as far as dense numpy finds in the files, without a checkpoint."""

import json
from pathlib import Path

import pytest
from lora_files import (
    COMFY,
    QUERY,
    TEXT,
    dense,
    distance,
    energy,
    factors,
    kohya,
    restored,
    share,
    spelled,
    write,
    write_lora,
    write_related,
)
from safetensors import safe_open
from tiny_family import merge, snapshot

from hyper_merge.errors import MismatchError, NameTakenError, OutputError, RecipeError
from hyper_merge.runs.folders import Folders


@pytest.fixture(scope="module")
def related(tmp_path_factory):
    return write_related(tmp_path_factory.mktemp("related"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"allocation": "even", "multipliers": "shared"},
        {"method": "greedy", "dtype": "bfloat16"},
        {"layer_weights": "layout", "fit_weights": (1.0, 1.0, 1.0, 3.0)},
        {"budget": 60_000},
        {"target": 0.8},
        {"topup": "2", "ranks": (3,)},
    ],
    ids=str,
)
def test_what_the_report_says_holds_for_the_files(tmp_path, related, settings):
    result = share(related, tmp_path / "models", **settings)
    for path, row in zip(related, result.report.checkpoints, strict=True):
        original = dense(path)
        left = distance(restored(result, row), original) / energy(original)
        assert row.explained == pytest.approx(1 - left, abs=2e-4)
        for which, part in (
            ("unet", row.explained_unet),
            ("text_encoder", row.explained_text_encoder),
        ):
            inside = {
                m: x for m, x in original.items() if m.startswith("lora_te") == (which != "unet")
            }
            got = {m: x for m, x in restored(result, row).items() if m in inside}
            assert part == pytest.approx(1 - distance(got, inside) / energy(inside), abs=2e-4)
    if "budget" in settings:
        assert sum(path.stat().st_size for path in result.loras) <= settings["budget"]
    if "target" in settings:
        assert min(row.explained for row in result.report.checkpoints) >= 0.8 - 1e-3


def test_what_is_shared_is_found(tmp_path, related):
    result = share(related, tmp_path / "models", ranks=(8, 8))
    assert result.report.loss < 0.1
    assert result.report.loss < 0.5 * result.report.private_loss


def test_with_all_ranks_every_input_comes_back(tmp_path):
    paths = [write_lora(tmp_path / f"{c}.safetensors", c, rank=2) for c in range(2)]
    settings = {"iterations": 30, "tolerance": 1e-6, "lora_dtype": "same"}
    result = share(paths, tmp_path / "models", ranks=(2, 2), **settings)
    assert min(row.explained for row in result.report.checkpoints) > 0.9999


def test_an_input_alone_in_a_layer_is_carried(tmp_path):
    one = write_lora(tmp_path / "a.safetensors", 0, rank=2, modules=[QUERY])
    two = write_lora(tmp_path / "b.safetensors", 1, rank=2, modules=[TEXT])
    result = share([one, two], tmp_path / "models", ranks=(2, 2), iterations=20)
    for path, row in zip((one, two), result.report.checkpoints, strict=True):
        original = dense(path)
        left = distance(restored(result, row), original) / energy(original)
        assert row.explained == pytest.approx(1 - left, abs=2e-4)
        assert left < 0.01


def test_other_spellings_give_the_same(tmp_path):
    pairs = [factors(3, seed) for seed in range(3)]
    one = [write(tmp_path / f"{c}.safetensors", kohya(x)) for c, x in enumerate(pairs)]
    (tmp_path / "other").mkdir()
    two = [
        write(
            tmp_path / "other" / f"{c}.safetensors",
            spelled(x, COMFY, "lora_B.weight", "lora_A.weight"),
        )
        for c, x in enumerate(pairs)
    ]
    first, second = (
        share(paths, tmp_path / f"models{place}") for place, paths in enumerate((one, two))
    )
    assert first.report.loss == pytest.approx(second.report.loss, rel=1e-6)


def test_the_files_say_what_they_are(tmp_path, related):
    result = share(related, tmp_path / "models")
    for path in result.loras:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_output_name"] == path.stem
        assert metadata["ss_base_model_version"] == "sd_v1"
        assert "ss_sd_model_name" not in metadata
        assert len(json.loads(metadata["hyper_merge.multipliers"])) == len(related)
        card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        assert "stand for 4 LoRAs" in card["description"]
        assert path.with_suffix(".png").exists()
    manifest = json.loads((result.folder / "loras.json").read_text(encoding="utf-8"))
    assert [source["name"] for source in manifest["sources"]] == [path.name for path in related]
    assert "LoRA " in (result.folder / "report.txt").read_text(encoding="utf-8")


def test_names_are_kept_apart(tmp_path, related):
    output = tmp_path / "models"
    result = share(related, output)
    before = snapshot(output)
    with pytest.raises(NameTakenError, match="mix"):
        share(related, output)
    assert snapshot(output) == before
    owners = Folders.under(output).lora_owners()
    assert {owners[path.stem] for path in result.loras} == {"mix"}
    again = share(related, output, ranks=(4,), overwrite=True)
    left = {path.name for path in (output / "Lora").glob("*.safetensors")}
    assert left == {path.name for path in again.loras}


@pytest.mark.parametrize("settings", [{}, {"ranks": (6, 2)}, {"budget": 60_000}], ids=str)
def test_no_input_is_replaced_or_removed(tmp_path, related, settings):
    output = tmp_path / "models"
    of_the_run = share(related, output).loras
    (output / "Lora/mix_0-9.safetensors").write_bytes(related[0].read_bytes())
    before = snapshot(output)
    for inputs in (of_the_run, [output / "Lora/mix_0-9.safetensors", *related[1:]]):
        values = {"ranks": (9, 2)} if inputs is not of_the_run else settings
        with pytest.raises(OutputError, match=r"mix_.*\.safetensors is one of the files that are"):
            share(inputs, output, overwrite=True, **values)
        after = snapshot(output)
        assert {key: after.get(key) for key in before} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_differ_by_case_alone_are_kept_apart(tmp_path, related, files, overwrite):
    output = tmp_path / "models"
    share(related, output)
    with pytest.raises(NameTakenError, match="differs from MIX by case alone"):
        share(related, output, name="MIX", ranks=(5, 2), overwrite=overwrite)
    if overwrite:
        with pytest.raises(NameTakenError, match="differs from MIX by case alone"):
            merge(files, output, name="MIX", overwrite=True)
    else:
        assert merge(files, output, name="MIX").place.run == "MIX-2"
        with pytest.raises(NameTakenError, match="differs from mix-2 by case alone"):
            share(related, output, name="mix-2", ranks=(5, 2))


def test_a_merge_of_checkpoints_does_not_replace_it(tmp_path, related, files):
    share(related, tmp_path / "models")
    with pytest.raises(NameTakenError, match="run of LoRAs"):
        merge(files, tmp_path / "models", overwrite=True)
    assert merge(files, tmp_path / "models").place.run == "mix-2"


def test_a_run_of_checkpoints_is_not_replaced(tmp_path, related):
    folder = tmp_path / "models" / "hyper-merge" / "mix"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(NameTakenError, match="run of checkpoints"):
        share(related, tmp_path / "models", overwrite=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"exact": "norms"}, "exact"), ({"vae": "average"}, "vae"), ({"budget": 1000}, "too small")],
)
def test_settings_about_checkpoints_are_refused(tmp_path, related, settings, words):
    with pytest.raises(RecipeError, match=words):
        share(related, tmp_path / "models", **settings)


def test_files_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [write_lora(folder / "a.safetensors", 0) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(MismatchError, match="same name"):
        share(paths, tmp_path / "models")


def test_a_damaged_input_leaves_nothing_behind(tmp_path, related):
    state = kohya(factors(3, 9))
    state[f"{QUERY}.lora_up.weight"][0, 0] = float("nan")
    bad = write(tmp_path / "bad.safetensors", state)
    output = tmp_path / "models"
    output.mkdir()
    with pytest.raises(Exception, match=r"bad\.safetensors holds NaN"):
        share([*related, bad], output)
    assert not [
        p
        for p in output.rglob("*")
        if p.is_file() and p.name != "hashes.json" and Path(p).suffix != ".lock"
    ]
