"""Pictures beside those of the originals: what is drawn in which order, how far apart, what is written."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_family import snapshot

from hyper_merge.errors import InterruptedRun, PictureError, RunError
from hyper_merge.operations.compare import image_difference
from hyper_merge.operations.compare.compare import ImageGenerator, run_compare
from hyper_merge.operations.compare.grid import Band, Cell, draw_grid
from hyper_merge.operations.compare.image_difference import difference_picture, mean_difference
from hyper_merge.operations.compare.records import (
    ComparisonFigures,
    comparison_names,
    comparison_paths,
    load_comparison,
)
from hyper_merge.operations.compare.request import (
    CompareRequest,
    Picture,
    PictureSettings,
    Subject,
    plan_pictures,
)
from hyper_merge.operations.compare.text import format_caption
from hyper_merge.runs.deletion import delete_run, files_of
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress

SETTINGS = PictureSettings(("a cat", "a dog"), "blurry", "Euler", 4, 7.0, 64, 72, (1, 2))
REQUEST = CompareRequest("mix", ("a", "b"), SETTINGS)
GREYS = {"mix": 100, "a": 110, "b": 96, "c": 60}


def grey(value):
    return Image.new("RGB", (64, 72), (value, value, value))


class Painter:
    """A studio that draws each model in its own grey, two levels lighter with LoRAs."""

    def __init__(self):
        self.drawn = []

    def __call__(self, picture, progress):
        self.drawn.append(picture)
        progress.report("", 0.5)
        tagged = 2 if "<lora:" in picture.prompt else 0
        return grey(GREYS[picture.model.stem] + tagged)


@pytest.fixture
def folders(started, files):
    """A merge of a, b and c, whose originals are elsewhere."""
    return Folders.under(started)


@pytest.fixture
def painter():
    return Painter()


@pytest.fixture
def compare(folders, painter):
    def run(request=REQUEST, progress=None, refusal=lambda path: ""):
        studio = ImageGenerator("a test", painter, refusal)
        return run_compare(request, folders, progress or Progress(), studio)

    return run


def groups(items):
    """Returns the items with consecutive equal ones once."""
    return [x for i, x in enumerate(items) if i == 0 or items[i - 1] != x]


def test_each_model_and_lora_set_is_loaded_once(compare, painter):
    compare(replace(REQUEST, average=True))
    assert groups([picture.model.stem for picture in painter.drawn]) == ["mix", "a", "b"]
    tags = [p.prompt.partition("<")[2] for p in painter.drawn if p.model.stem == "mix"]
    assert len(groups(tags)) == 3
    assert tags[0] == ""
    assert len(painter.drawn) == 4 + 2 * 4 + 2 * 4


def test_the_pictures_of_a_pair_share_prompt_and_settings(compare, painter, folders):
    compare()
    report = load_run(folders, "mix").report
    tags = report.tags(report.checkpoints[0])
    source = [p for p in painter.drawn if p.model.stem == "a" or p.prompt.endswith(tags)]
    pairs = [(p.prompt.removesuffix(tags).strip(), p.seed) for p in source]
    assert pairs[:4] == pairs[4:] == [(x, s) for x in ("a cat", "a dog") for s in (1, 2)]
    assert {id(p.settings) for p in painter.drawn} == {id(SETTINGS)}


def test_the_average_alone_is_drawn_once_for_all_checkpoints(compare, painter):
    compare(replace(REQUEST, checkpoints=("a", "b", "c"), average=True))
    plain = [p for p in painter.drawn if p.model.stem == "mix" and "<" not in p.prompt]
    assert len(plain) == len(SETTINGS.bands)


def test_a_checkpoint_named_twice_is_drawn_once(compare, painter):
    result = compare(replace(REQUEST, checkpoints=("a", "a.safetensors")))
    assert list(result.tags) == ["a"]
    assert len(painter.drawn) == 8


def test_figures_are_the_mean_absolute_differences(compare):
    result = compare(replace(REQUEST, average=True))
    by_name = {item.checkpoint: item.pixels for item in result.figures}
    assert by_name == {
        "a": {"restored": 8.0, "average": 10.0},
        "b": {"restored": 6.0, "average": 4.0},
    }
    assert len(result.figures) == 2 * len(SETTINGS.bands)


def test_a_difference_counts_all_pixels_colours_and_signs():
    one = Image.new("RGB", (2, 2), (10, 20, 30))
    other = one.copy()
    other.putpixel((0, 1), (13, 14, 30))
    assert mean_difference(one, other) == pytest.approx((3 + 6) / 12, abs=1e-12)
    assert mean_difference(other, one) == mean_difference(one, other)
    drawn = difference_picture(one, other)
    assert drawn.getpixel((0, 1)) == (12, 24, 0)
    assert drawn.getpixel((1, 1)) == (0, 0, 0)
    with pytest.raises(ValueError, match="of one size"):
        mean_difference(one, Image.new("RGB", (3, 2)))


def test_a_caption_gives_levels_percent_and_any_lpips():
    figures = ComparisonFigures("a", "x", 1, {"restored": 5.1}, {"restored": 0.25})
    assert format_caption(figures, "restored") == "5.10 of 255 (2.0%), LPIPS 0.250"
    assert format_caption(figures, "average") == ""


def test_lpips_is_recorded_where_the_host_has_it(compare, monkeypatch):
    assert compare().measure == ""
    monkeypatch.setattr(
        "hyper_merge.operations.compare.compare.perceptual_distance",
        lambda size: lambda one, other: 0.125,
    )
    result = compare(replace(REQUEST, average=True))
    assert result.measure == "LPIPS"
    assert result.figures[0].perceptual == {"restored": 0.125, "average": 0.125}


def test_lpips_gets_numbers_from_minus_one_to_one(monkeypatch, tmp_path):
    inputs = []

    class LPIPS(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex"

        def forward(self, one, other):
            inputs.extend([one, other])
            return (one - other).abs().mean().view(1, 1, 1, 1)

    assert image_difference.perceptual_distance((64, 64)) is None
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    monkeypatch.setattr(image_difference, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert image_difference.perceptual_distance((64, 64)) is None  # its network is not here
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/alexnet-owt-7be5be79.pth").touch()
    assert image_difference.perceptual_distance((56, 64)) is None
    image_difference._network.cache_clear()
    distance = image_difference.perceptual_distance((64, 72))
    assert distance(grey(255), grey(0)) == pytest.approx(2.0, abs=1e-6)
    image_difference._network.cache_clear()
    assert [tuple(x.shape) for x in inputs] == [(1, 3, 72, 64)] * 2
    assert (float(inputs[0].max()), float(inputs[1].min())) == (1.0, -1.0)


def test_grid_and_figures_are_written_and_read_back(compare, folders):
    result = compare(replace(REQUEST, average=True, difference=True))
    run = load_run(folders, "mix")
    picture, figures = comparison_paths(run, "comparison-1")
    assert load_comparison(run, "comparison-1") == result
    with Image.open(picture) as grid:
        assert json.loads(grid.text["hyper_merge.comparison"]) == json.loads(figures.read_text())
        words = grid.text["parameters"].splitlines()
        pixels = {pixel for _, pixel in grid.convert("RGB").getcolors(1 << 24)}
    assert words[:3] == ["a cat", "a dog", "Negative prompt: blurry"]
    assert words[3].startswith("Steps: 4, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x72")
    # hyper-model with LoRAs, originals, hyper-model alone, four times the differences
    for value in (102, 110, 96, 100, 32, 24, 40, 16):
        assert (value, value, value) in pixels


def test_no_comparison_replaces_another(compare, folders):
    assert compare().name == "comparison-1"
    assert compare().name == "comparison-2"
    run = load_run(folders, "mix")
    (run.folder / "pictures/comparison-7.png").write_bytes(b"somebody's")
    assert compare().name == "comparison-8"
    assert comparison_names(run) == ["comparison-8", "comparison-2", "comparison-1"]


@pytest.mark.parametrize("case", ["missing", "changed", "refused"])
def test_an_original_that_cannot_be_drawn_is_skipped(compare, painter, started, case):
    shutil.rmtree(started / "hyper-merge/cache")  # it remembers where files of a hash were
    manifest = started / "hyper-merge/mix/manifest.json"
    text = manifest.read_text()
    source = next(x for x in json.loads(text)["sources"] if x["name"] == "b.safetensors")
    if case == "missing":
        manifest.write_text(text.replace(source["path"], str(started / "gone/b.safetensors")))
    elif case == "changed":
        away = started / "b.safetensors"
        away.write_bytes(b"something else")
        manifest.write_text(text.replace(source["path"], str(away)))
    refuse = (lambda path: "no" if path.stem == "b" else "") if case == "refused" else None
    result = compare(**({"refusal": refuse} if refuse else {}))
    reason = {"missing": "it is missing", "changed": "it was changed since", "refused": "no"}
    assert result.notes == (f"b.safetensors is left out: {reason[case]}",)
    assert result.originals == {"a": "a.safetensors"}
    assert [p.model.stem for p in painter.drawn].count("b") == 0
    assert len([p for p in painter.drawn if p.model.stem == "mix"]) == 8
    assert [item.pixels for item in result.figures if item.checkpoint == "b"] == [{}] * 4


def test_an_unloadable_hyper_model_is_refused(compare, painter):
    with pytest.raises(PictureError, match=r"mix\.safetensors cannot be drawn with: too new"):
        compare(refusal=lambda path: "too new" if path.stem == "mix" else "")
    assert painter.drawn == []


def test_a_missing_or_replaced_lora_is_refused_before_drawing(compare, painter, started):
    lora = started / "Lora/mix_0-4.safetensors"
    other = (started / "Lora/mix_1-2.safetensors").read_bytes()
    before = lora.read_bytes()
    lora.write_bytes(other)
    with pytest.raises(RunError, match=r"mix_0-4\.safetensors was edited or replaced"):
        compare()
    lora.unlink()
    with pytest.raises(RunError, match=r"mix_0-4\.safetensors of the run mix is missing"):
        compare()
    lora.write_bytes(before)
    assert painter.drawn == []
    with pytest.raises(RunError, match="has no checkpoint d"):
        compare(replace(REQUEST, checkpoints=("a", "d")))


def test_progress_names_every_picture_and_rises(compare):
    messages = []
    compare(progress=Progress(lambda phase, fraction: messages.append((phase, fraction))))
    fractions = [fraction for _, fraction in messages]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    phases = groups([phase for phase, _ in messages])
    assert "picture 1 of 16: a, hyper-model + LoRAs, seed 1" in phases
    assert "picture 16 of 16: b, original, seed 2" in phases


@pytest.mark.parametrize("after", [0, 3, 15])
def test_an_interrupt_ends_it_with_nothing_written(compare, painter, started, after):
    before = snapshot(started)
    with pytest.raises(InterruptedRun):
        compare(progress=Progress(should_stop=lambda: len(painter.drawn) > after))
    assert len(painter.drawn) == after + 1
    assert snapshot(started) == before


def test_an_error_in_drawing_leaves_nothing_behind(folders, started):
    def fail(picture, progress):
        raise PictureError("out of paint")

    before = snapshot(started)
    with pytest.raises(PictureError, match="out of paint"):
        run_compare(REQUEST, folders, Progress(), ImageGenerator("a test", fail))
    assert snapshot(started) == before


def test_deleting_a_run_deletes_only_its_own_comparisons(compare, folders):
    compare()
    run = load_run(folders, "mix")
    source = [path.name for path in files_of(run, folders) if path.parent.name == "pictures"]
    assert source == ["comparison-1.json", "comparison-1.png"]
    notes = run.folder / "pictures/notes.txt"
    notes.write_text("mine")
    delete_run(run, folders)
    assert [path.name for path in run.folder.rglob("*")] == ["pictures", "notes.txt"]


def test_a_damaged_or_strange_comparison_is_named(compare, folders):
    compare()
    run = load_run(folders, "mix")
    path = run.folder / "pictures/comparison-1.json"
    record = json.loads(path.read_text())
    for text in ("{", json.dumps({**record, "version": 2}), json.dumps({**record, "figures": 3})):
        path.write_text(text)
        with pytest.raises(RunError, match=r"comparison-1 of the run mix cannot be read"):
            load_comparison(run, "comparison-1")
    with pytest.raises(RunError, match="there is no comparison-2"):
        load_comparison(run, "comparison-2")
    for name in ("../../mix", "comparison-1/..", "", "manifest"):
        with pytest.raises(RunError, match="expected the name of a comparison"):
            load_comparison(run, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "expected a prompt"),
        ({"prompts": ("a", " ")}, "expected a prompt"),
        ({"seeds": ()}, "expected a seed"),
        ({"seeds": (1, -1)}, "seed: expected 0 to"),
        ({"steps": 0}, "steps: expected 1 to 150, got 0"),
        ({"cfg_scale": float("nan")}, "CFG scale: expected 0 to 30, got nan"),
        ({"width": 100}, "width: expected a multiple of 8 pixels, got 100; 96 would do"),
        ({"height": 4096}, "height: expected 64 to 2048, got 4096"),
    ],
)
def test_settings_that_no_host_could_draw_are_refused(changes, message):
    with pytest.raises(PictureError, match=message):
        replace(SETTINGS, **changes)


def test_a_request_without_or_with_excessive_pictures_is_refused():
    with pytest.raises(PictureError, match="expected a checkpoint"):
        replace(REQUEST, checkpoints=())
    with pytest.raises(PictureError, match="would be 800 pictures, more than 200"):
        replace(REQUEST, settings=replace(SETTINGS, seeds=tuple(range(100))))


def test_a_plan_without_an_original_draws_the_loras_alone():
    subject = Subject("a", "<lora:x:1>", None, "gone")
    plan = plan_pictures(REQUEST, Path("mix.safetensors"), [subject])
    assert {key.row for key in plan} == {"restored"}
    assert next(iter(plan.values())) == Picture(
        Path("mix.safetensors"), "a cat <lora:x:1>", 1, SETTINGS
    )


def test_pictures_shrink_only_where_the_grid_grows_too_large():
    cells = [Cell(grey(value)) for value in (1, 2)]
    small = draw_grid(["x"], ["a", "b"], [Band("", {"row": cells})], (64, 72))
    count = {pixel: number for number, pixel in small.getcolors(1 << 24)}
    assert count[1, 1, 1] == count[2, 2, 2] == 64 * 72
    for columns, bands in ((40, 5), (1, 200)):
        rows = {"row": [Cell(cells[0].picture, "", "caption")] * columns}
        large = draw_grid(["x"], ["a"] * columns, [Band("", rows)] * bands, (2048, 2048))
        assert large.width * large.height < Image.MAX_IMAGE_PIXELS
