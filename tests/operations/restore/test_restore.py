"""A restored checkpoint is the average plus multipliers times LoRAs, and as near as the report says."""

import json
import shutil
from types import SimpleNamespace
from weakref import WeakSet

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import (
    NORM,
    POSITION_IDS,
    VAE,
    added,
    layers_of,
    load,
    merge,
    snapshot,
    temporaries,
    write,
)

from hyper_merge.checkpoints.reader import CheckpointReader, read_header
from hyper_merge.errors import (
    InterruptedRun,
    NameTakenError,
    NonFiniteError,
    OutputError,
    RecipeError,
    RunError,
)
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.restore.request import RestoreRequest, parse_mix
from hyper_merge.operations.restore.restore import run_restore
from hyper_merge.operations.restore.text import format_restore
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runs.weighted_loras import weighted_loras_of, weighted_loras_of_mixture
from hyper_merge.runtime.progress import Progress

MODULE = "hyper_merge.operations.restore.restore"


@pytest.fixture(scope="session")
def session(tmp_path_factory, state_of):
    """A float32 merge of float32 files with companions; not to be changed."""
    folder = tmp_path_factory.mktemp("restored")
    models = [
        write(folder / f"{name}.safetensors", state_of(c, torch.float32))
        for c, name in enumerate("abc")
    ]
    merged = merge(models, folder / "models", dtype="float32", exact="all", weights=(3, 1, 2))
    return SimpleNamespace(models=models, merged=merged, root=folder / "models")


@pytest.fixture
def single(session, tmp_path):
    """A copy of the session's merge in a folder of its own."""
    root = shutil.copytree(session.root, tmp_path / "models")
    manifest = root / "hyper-merge/mix/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(session.root), str(root)))
    return SimpleNamespace(
        models=session.models, report=session.merged.report, root=root, folders=Folders.under(root)
    )


@pytest.fixture
def at(started, merged):
    """The folders of a float16 merge, with a manifest as if it had been made there."""
    manifest, root = started / "hyper-merge/mix/manifest.json", merged.place.loras.parent
    manifest.write_text(manifest.read_text().replace(str(root), str(started)))
    return Folders.under(started)


def restore(folders, shares, progress=None, **settings):
    target = RestoreRequest(
        "mix", shares if isinstance(shares, dict) else {shares: 1.0}, **settings
    )
    return run_restore(target, folders, progress or Progress())


def exact(folders, shares):
    """Returns the tensors that the file should have, from the files on disk in float64."""
    run = load_run(folders, "mix")
    state = {key: tensor.double() for key, tensor in load(run.hyper_model).items()}
    for term in weighted_loras_of_mixture(run, shares):
        lora = load_file(term.path)
        for layer in layers_of(run.hyper_model, ends=True):
            rows = slice(*layer.rows) if layer.rows else slice(None)
            delta = term.times(layer.part) * added(lora, layer.module).expand(layer.m, layer.n)
            state[layer.key][rows] += delta.reshape(state[layer.key][rows].shape)
        for key in state:
            stem, _, end = key.rpartition(".")
            path = stem.removeprefix("model.diffusion_model.")
            name = "lora_unet_" + {"input_blocks.0.0": "conv_in"}.get(path, path.replace(".", "_"))
            ends = {"weight": ["w_norm"], "bias": ["b_norm", "diff_b"]}.get(end, [])
            for result in (lora[f"{name}.{e}"] for e in ends if f"{name}.{e}" in lora):
                state[key] += term.multiplier * result.double()
    return state


@pytest.mark.parametrize("c", range(3))
def test_every_checkpoint_comes_back_to_the_reported_loss(single, c):
    row = single.report.checkpoints[c]
    restored = restore(single.folders, row.name)
    assert restored.path == single.root / f"Stable-diffusion/{row.name}-restored.safetensors"
    result, original = load(restored.path), load(single.models[c])
    base = load(single.root / "Stable-diffusion/mix.safetensors")
    energy = error = 0.0
    for key in {layer.key for layer in layers_of(single.models[c], ends=True)}:
        energy += float((original[key].double() - base[key].double()).square().sum())
        error += float((original[key].double() - result[key].double()).square().sum())
    assert 1 - error / energy == pytest.approx(row.explained, abs=1e-6)
    assert restored.compared.explained == pytest.approx(row.explained, abs=1e-6)
    assert restored.compared.reported == row.explained
    assert sum(part.lost for part in restored.compared.parts) == pytest.approx(error / energy)
    everything = [
        sum(
            float((original[key].double() - state[key].double()).square().sum())
            for key in result
            if key != POSITION_IDS
        )
        for state in (base, result)
    ]
    share = 1 - everything[1] / everything[0]
    assert restored.compared.everything == pytest.approx(share, abs=1e-6)


def test_a_restored_checkpoint_is_hyper_model_plus_loras(single):
    restored = restore(single.folders, "b")
    expected, result = exact(single.folders, {"b": 1.0}), load(restored.path)
    base = load(single.root / "Stable-diffusion/mix.safetensors")
    assert [*result] == [*base]
    for key, tensor in result.items():
        torch.testing.assert_close(tensor.double(), expected[key], atol=2e-6, rtol=2e-6)
    assert torch.equal(result[VAE], base[VAE])
    assert torch.equal(result[POSITION_IDS], base[POSITION_IDS])
    assert not torch.equal(result[NORM], base[NORM])  # the companions hold it


def test_a_half_precision_restore_rounds_the_exact_one(single, tmp_path):
    wide = load(restore(single.folders, "c", to=tmp_path / "wide.safetensors").path)
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        restored = restore(single.folders, "c", to=tmp_path / f"{name}.safetensors", dtype=name)
        assert restored.dtype == name
        for key, tensor in load(restored.path).items():
            assert torch.equal(tensor, wide[key].to(tensor.dtype)), key
            assert tensor.dtype == (torch.int64 if key == POSITION_IDS else dtype)


def test_a_mixture_is_linear_with_the_hyper_models_rest(single, tmp_path):
    base = load(single.root / "Stable-diffusion/mix.safetensors")
    one, two = (load(restore(single.folders, name).path) for name in "ab")
    shares = {"a": 0.5, "b": -0.25}
    restored = restore(single.folders, shares)
    assert restored.path.name == "mix-a 0.5-b -0.25.safetensors"
    result = load(restored.path)
    for key in base:
        b = base[key].double()
        expected = b + 0.5 * (one[key].double() - b) - 0.25 * (two[key].double() - b)
        torch.testing.assert_close(result[key].double(), expected, atol=2e-6, rtol=2e-6)
    assert restored.compared is None
    text = format_restore(restored)
    assert "the shares add up to 0.25; as in prompts, the hyper-model has the rest (0.75)" in text
    assert "the error cannot be measured: a mixture has no original\n" in text


def test_the_metadata_name_the_ingredients(single):
    restored = restore(single.folders, "a")
    metadata = read_header(restored.path).metadata
    run = load_run(single.folders, "mix")
    assert metadata["hyper_merge.kind"] == "restored"
    assert metadata["hyper_merge.run"] == "mix"
    assert metadata["modelspec.title"] == "a-restored"
    assert "hyper_merge.average_id" not in metadata
    (source,) = json.loads(metadata["hyper_merge.restores"])
    assert source == {"name": "a", "share": 1.0, "sha256": run.sources[0].sha256}
    rows = json.loads(metadata["hyper_merge.multipliers"])
    terms = weighted_loras_of(run, "a")
    assert rows == {t.path.stem: [t.multiplier, t.text_multiplier] for t in terms}
    assert set(json.loads(metadata["sd_merge_models"])) == {item.sha256 for item in run.sources}


def test_a_fitted_checkpoint_comes_back_with_its_top_up(single, tmp_path, state_of):
    state = {
        key: (tensor.float() * 1.01).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for key, tensor in state_of(1, torch.float32).items()
    }
    other = write(tmp_path / "later.safetensors", state)
    fitted = run_fit(
        FitRequest("mix", other, topup=PrivateLoraTarget(12)), single.folders, Progress()
    )
    restored = restore(single.folders, "later")
    assert fitted.topups
    assert fitted.explained >= 0.9
    assert restored.compared.explained == pytest.approx(fitted.explained, abs=1e-6)
    expected = exact(single.folders, {"later": 1.0})
    for key, tensor in load(restored.path).items():
        torch.testing.assert_close(tensor.double(), expected[key], atol=2e-6, rtol=2e-6)


@pytest.fixture
def originals(started, merged, files, tmp_path):
    """A float16 merge whose checkpoints are copies of the shared ones, beside the models folder."""
    manifest = started / "hyper-merge/mix/manifest.json"
    text = manifest.read_text().replace(str(merged.place.loras.parent), str(started))
    manifest.write_text(text.replace(str(files[0].parent), str(tmp_path)))
    (started / "hyper-merge/cache/hashes.json").unlink(missing_ok=True)  # of the files elsewhere
    return [tmp_path / shutil.copy(path, tmp_path / path.name) for path in files]


@pytest.mark.parametrize(
    ("how", "state"), [("gone", "is not there"), ("changed", "was changed since"), ("moved", "")]
)
def test_without_the_original_there_is_no_measured_error(originals, started, how, state):
    original = originals[1]
    if how == "gone":
        original.unlink()
    elif how == "changed":
        shutil.copy(originals[0], original)
    else:
        original.rename(started / "Stable-diffusion/b.safetensors")
    restored = restore(Folders.under(started), "b")
    if how == "moved":
        assert 0 < restored.compared.explained < 1
        return
    assert restored.compared is None
    assert restored.problem == (f"b.safetensors {state}, only its hash is known")


def test_the_configuration_of_the_hyper_model_goes_with_it(started, at, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.v_prediction_config", lambda header, family: "model: v\n")
    restored = restore(at, "a")
    beside = restored.path.with_suffix(".yaml")
    assert beside.read_text() == "model: v\n"
    monkeypatch.setattr(f"{MODULE}.v_prediction_config", lambda header, family: None)
    restore(at, "a", overwrite=True)
    assert not beside.exists()  # that of the file which was replaced


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ("a:0.5,b:0.5", {"a": 0.5, "b": 0.5}),
        (" a : 1 , b:-.25 ", {"a": 1.0, "b": -0.25}),
        ("one, two:2,three:1", {"one, two": 2.0, "three": 1.0}),
    ],
)
def test_shares_are_read_from_text(words, shares):
    assert parse_mix(words) == shares


@pytest.mark.parametrize("words", ["", "a", "a:b", "a:1,", "a:1,a:2", ":1", "a:1e400", "a:0.5;b:1"])
def test_other_texts_are_no_shares(words):
    if words == "a:1,":
        assert parse_mix(words) == {"a": 1.0}
        return
    with pytest.raises(RecipeError, match="expected checkpoints with their shares, such as"):
        parse_mix(words)


def edit_tensor(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        ("Lora/mix_0-4-exact.safetensors", lambda path: path.unlink(), "exact.* is missing in"),
        ("Lora/mix_0-4.safetensors", edit_tensor, "mix_0-4.* was edited or replaced since"),
        ("Stable-diffusion/mix.safetensors", lambda path: path.unlink(), "hyper-model.* missing"),
    ],
)
def test_an_incomplete_run_is_refused_with_nothing_written(single, name, act, message):
    act(single.root / name)
    before = snapshot(single.root)
    with pytest.raises(RunError, match=message):
        restore(single.folders, "a")
    assert snapshot(single.root) == before


def test_a_newer_or_incomplete_manifest_is_refused(single):
    path = single.root / "hyper-merge/mix/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["report"]["checkpoints"][0]["name"] = "other"
    path.write_text(json.dumps(manifest))
    before = snapshot(single.root)
    for shares in ("other", {"other": 0.5, "b": 0.5}):
        with pytest.raises(RunError, match="does not say which file other was; copy it back"):
            restore(single.folders, shares)
    assert snapshot(single.root) == before
    path.write_text(json.dumps(manifest | {"version": 99, "hyper_merge": "9.9"}))
    with pytest.raises(RunError, match=r"was made by Hyper-Merge 9\.9.*update Hyper-Merge"):
        restore(single.folders, "b")


def test_unknown_names_and_taken_places_are_refused(single, session):
    restore(single.folders, "a")
    before = snapshot(single.root)
    originals = [path.read_bytes() for path in session.models]
    with pytest.raises(RunError, match=r'has no checkpoint bb; did you mean "b"\? It has a, b, c'):
        restore(single.folders, {"a": 0.5, "bb": 0.5})
    with pytest.raises(OutputError, match=r"a-restored.safetensors exists"):
        restore(single.folders, "a")
    with pytest.raises(OutputError, match=r"is one of the files that are read"):
        restore(single.folders, "a", to=session.models[0], overwrite=True)
    for name in ("Stable-diffusion/mix", "Lora/mix_0-4"):
        with pytest.raises(OutputError, match=r"is one of the files that are read"):
            restore(single.folders, "a", to=single.root / f"{name}.safetensors", overwrite=True)
    with pytest.raises(OutputError, match=r"expected a path that ends with \.safetensors"):
        restore(single.folders, "a", to=single.root / "a.ckpt")
    with pytest.raises(RecipeError, match="expected one of float16"):
        restore(single.folders, "a", dtype="float8")
    assert snapshot(single.root) == before
    assert [path.read_bytes() for path in session.models] == originals
    assert restore(single.folders, "a", overwrite=True).compared


def test_another_runs_hyper_model_is_never_replaced(single, started):
    shutil.copytree(started / "hyper-merge/mix", single.root / "hyper-merge/else")
    manifest = single.root / "hyper-merge/else/manifest.json"
    path = single.root / "Stable-diffusion/else.safetensors"
    data = json.loads(manifest.read_text()) | {"name": "else", "hyper_model": str(path)}
    manifest.write_text(json.dumps(data))
    before = snapshot(single.root)
    with pytest.raises(NameTakenError, match=r"is the hyper-model of the run else"):
        restore(single.folders, "a", to=path, overwrite=True)
    assert snapshot(single.root) == before


def test_a_value_beyond_float16_is_refused(single):
    before = snapshot(single.root)
    with pytest.raises(NonFiniteError, match="is too large for float16; choose dtype"):
        restore(single.folders, {"a": 1e9}, dtype="float16")
    assert snapshot(single.root) == before


def test_a_wish_to_stop_leaves_nothing(single):
    before = snapshot(single.root)
    for fraction in (0.0, 0.05, 0.2, 0.4, 0.7, 0.99):
        now = [0.0]
        progress = Progress(
            lambda phase, at, now=now: now.__setitem__(0, at),
            lambda now=now, fraction=fraction: now[0] >= fraction,
        )
        with pytest.raises(InterruptedRun):
            restore(single.folders, "a", progress)
        assert snapshot(single.root) == before
        assert temporaries(single.root) == []


def test_progress_rises_to_its_end(single):
    messages = []
    restore(single.folders, "a", Progress(lambda phase, fraction: messages.append(fraction)))
    assert messages == sorted(messages)
    assert messages[-1] == 1


def test_few_tensors_are_in_memory_at_a_time(single, monkeypatch):
    alive, most, count = WeakSet(), [0], [0]
    tensor = CheckpointReader.tensor

    def counted(self, key):
        result = tensor(self, key)
        alive.add(result)
        count[0] += 1
        most[0] = max(most[0], len(alive))
        return result

    monkeypatch.setattr(CheckpointReader, "tensor", counted)
    restore(single.folders, "a")
    assert 2 <= most[0] < 60 < count[0]
