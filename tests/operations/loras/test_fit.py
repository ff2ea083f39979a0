"""A LoRA is fitted onto shared ones as dense least squares does it, from the files alone."""

import numpy as np
import pytest
from lora_files import (
    SHAPES,
    dense,
    distance,
    energy,
    factors,
    kohya,
    share,
    write,
    write_few,
    write_lora,
    write_related,
)

from hyper_merge.errors import MismatchError, OutputError, RunError
from hyper_merge.loras.prompt_tags import parse_tags
from hyper_merge.operations.fit.request import FitRequest
from hyper_merge.operations.loras.fit import run_lora_fit
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.lora_runs import is_lora_run, load_lora_run
from hyper_merge.runtime.progress import Progress


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    return share(write_related(folder), folder / "models"), Folders.under(folder / "models")


def fit(shared, path, **settings):
    return run_lora_fit(FitRequest("mix", path, **settings), shared[1], Progress())


def test_multipliers_are_those_of_least_squares(tmp_path, shared):
    result, folders = shared
    path = write_lora(tmp_path / "new.safetensors", 55, rank=3)
    record = fit(shared, path)
    target, blocks = dense(path), [dense(lora) for lora in result.loras]
    total = {}
    for is_text, found in ((False, record.row.multipliers), (True, record.row.text_multipliers)):
        modules = [module for module in SHAPES if module.startswith("lora_te") == is_text]
        columns = [np.concatenate([b[m].ravel() for m in modules]) for b in blocks]
        right = np.concatenate([target[m].ravel() for m in modules])
        expected = np.linalg.lstsq(np.stack(columns, 1), right, rcond=None)[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
        for module in modules:
            total[module] = sum(x * b[module] for x, b in zip(expected, blocks, strict=True))
    assert record.row.explained == pytest.approx(
        1 - distance(total, target) / energy(target), abs=1e-6
    )
    run = load_lora_run(folders, "mix")
    assert [tag.name for tag in parse_tags(record.tags(run))] == [
        lora.stem for lora in result.loras
    ]
    assert record in load_fits(run)[0]


def test_an_input_is_found_again(tmp_path, shared):
    result, folders = shared
    run = load_lora_run(folders, "mix")
    row = result.report.checkpoints[1]
    record = fit(shared, run.sources[1].path, name="again")
    np.testing.assert_allclose(record.row.multipliers, row.multipliers, atol=2e-3)
    assert record.row.explained == pytest.approx(row.explained, abs=1e-4)


def test_what_does_not_go_with_the_run_is_refused(tmp_path, shared):
    _, folders = shared
    other = write_few(tmp_path / "xl.safetensors", "sdxl", "attn2_to_k")
    with pytest.raises(MismatchError, match=r"xl\.safetensors .*Stable Diffusion XL.*mix"):
        fit(shared, other)
    path = write_lora(tmp_path / "twice.safetensors", 56)
    fit(shared, path)
    with pytest.raises(OutputError, match="exists"):
        fit(shared, path)
    fit(shared, path, overwrite=True)
    assert not is_lora_run(folders, "nothing")
    assert not is_lora_run(folders, "../mix")


def test_edited_loras_and_manifests_are_noticed(tmp_path):
    result = share(write_related(tmp_path, count=2), tmp_path / "models")
    folders = Folders.under(tmp_path / "models")
    path = write_lora(tmp_path / "new.safetensors", 57)
    write(result.loras[0], kohya(factors(3, 5)))
    with pytest.raises(RunError, match="edited or replaced"):
        run_lora_fit(FitRequest("mix", path), folders, Progress())
    result.loras[0].unlink()
    assert load_lora_run(folders, "mix").missing == (result.loras[0],)
    with pytest.raises(RunError, match="missing"):
        run_lora_fit(FitRequest("mix", path), folders, Progress())
    (result.folder / "loras.json").write_text('{"version": 1}', encoding="utf-8")
    with pytest.raises(RunError, match="damaged"):
        run_lora_fit(FitRequest("mix", path), folders, Progress())
