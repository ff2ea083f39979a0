"""An analysis that is extended by further checkpoints is that of all of them, as far as it can know."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_family import KEPT, TINY, inputs_of, load

from hyper_merge.analysis import basis_widths, extension
from hyper_merge.analysis.cache import analysis_path
from hyper_merge.analysis.extension import (
    EarlierAnalysis,
    ExtensionLimits,
    extend_analysis,
    limits_of,
    sample_all,
)
from hyper_merge.analysis.store import create_analysis, open_analysis
from hyper_merge.analysis.streaming_pass import PassOptions, analyze_in_threads, stream_layers
from hyper_merge.checkpoints.architectures.layout import Treatment
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.decomposition import contrasts
from hyper_merge.decomposition.extension import Extension
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.writer import write_family

CPU = torch.device("cpu")
COUNT, NEW, WIDE = 6, 2, 512
BLOCKS = tuple(tuple(float(1 + (c + b) % 3) for b in range(26)) for c in range(COUNT))


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Returns six checkpoints, mixtures of three fine-tunes with a part of their own each."""
    folder = tmp_path_factory.mktemp("six")
    names = [f"model-{place}" for place in range(COUNT)]
    return write_few_layers(folder, replace(TINY, count=COUNT), names)


def write_few_layers(folder, spec, names):
    """Writes a family with every kind of layer once."""
    paths = write_family(folder, spec, names, overwrite=True)
    for path in paths:
        save_file({key: x for key, x in load(path).items() if KEPT.fullmatch(key)}, path)
    return list(paths)


@pytest.fixture
def narrow(monkeypatch):
    """Lets bases be narrower than layers of such small checkpoints are."""
    monkeypatch.setattr(basis_widths, "_LEAST", 8)
    monkeypatch.setattr(basis_widths, "_STEP", 2)


def settings_of(kind, count, family):
    return {
        "plain": {},
        "float32": {"dtype": "float32"},
        "bfloat16": {"dtype": "bfloat16"},
        "weighted": {"weights": (3, 1, 2, 1, 1, 2)[:count]},
        "by block": {"block_weights": BLOCKS[:count]},
        "based": {"base": str(family[0].with_name("base.safetensors"))},
        "vae": {"vae": "average"},
    }[kind]


class Passes:
    """The averages, what LoRAs do not carry, and the open analyses of full and extended passes."""

    def __init__(self, folder, family, kind="plain", width=WIDE, old_count=COUNT - NEW):
        if kind == "based":
            write_few_layers(family[0].parent, replace(TINY, count=1, size=0.0), ["base"])
        self.folder = folder
        self.old = inputs_of(family[:old_count], **settings_of(kind, old_count, family))
        self.inputs = inputs_of(family, **settings_of(kind, COUNT, family))
        self.options = PassOptions(CPU, 0, width)
        samples = sample_all(self.old, Progress())
        path, averages, _ = self.run(
            self.old, basis_widths.options_by(samples, self.old, self.options)
        )
        average = self.old.base or self.write_average(averages)
        samples = sample_all(self.inputs, Progress())
        self.earlier = EarlierAnalysis(self.old, path, average, samples)
        self.widths = basis_widths.options_by(samples, self.inputs, self.options)

    def write_average(self, averages, name="average"):
        # what is copied is not among them
        whole = load(self.old.headers[0].path) | averages
        path = self.folder / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in whole.items()}, path)
        return read_header(path)

    def run(self, inputs, options, analyze=analyze_in_threads, name="old"):
        folder = self.folder / name
        path, averages = analysis_path(folder, inputs, options), {}
        with create_analysis(path, inputs, options) as written:
            outside = stream_layers(
                inputs, options, averages.__setitem__, written.keep, Progress(), analyze
            )
            written.close_with(outside)
        return path, averages, outside

    def full(self):
        return self.run(self.inputs, self.widths, name="full")

    def extended(self):
        analyze = extend_analysis(self.earlier, None)
        return self.run(self.inputs, self.widths, analyze, "extended")


def energy_of(analysis, index):
    return float(analysis.core(index).double().square().sum())


def relative(difference, size):
    return float((difference.double().norm() / size.double().norm()).nan_to_num())


@pytest.mark.parametrize(
    "kind", ["plain", "float32", "bfloat16", "weighted", "by block", "based", "vae"]
)
def test_where_bases_hold_everything_both_are_the_same(family, tmp_path, kind):
    passes = Passes(tmp_path, family, kind)
    path, averages, outside = passes.full()
    other_path, others, other_outside = passes.extended()
    assert averages.keys() == others.keys()
    for key in filter(lambda key: averages[key].is_floating_point(), averages):
        average = averages[key]
        step = torch.finfo(average.dtype).eps * average.float().abs().max()
        assert float((average.float() - others[key].float()).abs().max()) <= 2 * step
    for name, squares in outside.items():
        assert torch.allclose(squares, other_outside[name], rtol=1e-4)
    with (
        open_analysis(path, passes.inputs) as whole,
        open_analysis(other_path, passes.inputs) as more,
    ):
        for index, layer in enumerate(whole.layers):
            gram, core = whole.grams[index], whole.core(index)
            assert relative(more.grams[index] - gram, gram) < 2e-3
            if whole.core_shape(index) == (layer.m, layer.n):
                assert relative(more.core(index) - core, core) < 2e-3
            assert energy_of(more, index) == pytest.approx(energy_of(whole, index), rel=5e-3)


@pytest.mark.parametrize(("old_count", "few"), [(4, 16), (4, 2), (4, 3), (5, 16)])
def test_narrow_bases_hold_almost_as_much(family, tmp_path, narrow, monkeypatch, old_count, few):
    monkeypatch.setattr(contrasts, "FEW", few)
    monkeypatch.setattr(contrasts, "KEPT", 4)
    monkeypatch.setattr(basis_widths, "_COMMON", 2)
    passes = Passes(tmp_path, family, width=20, old_count=old_count)
    (path, *_), (other_path, *_) = passes.full(), passes.extended()
    with (
        open_analysis(path, passes.inputs) as whole,
        open_analysis(other_path, passes.inputs) as more,
    ):
        energy = float(whole.grams[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum())
        assert float(more.grams[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum()) == pytest.approx(
            energy, rel=1e-3
        )
        inside, other_inside = (
            sum(energy_of(analysis, index) for index in range(len(analysis.layers))) / energy
            for analysis in (whole, more)
        )
        assert 0.5 < inside < 0.99
        assert other_inside > 0.97 * inside
        deviations = passes.inputs.contrasts.to_deviations
        for gram, other in zip(whole.grams, more.grams, strict=True):
            squares, others = (
                (deviations @ part[:-1, :-1] @ deviations.mT).diagonal() for part in (gram, other)
            )
            assert relative(others - squares, squares) < 0.02


def test_the_rounding_error_of_the_new_average_is_known(family, tmp_path, narrow):
    passes = Passes(tmp_path, family, "bfloat16", width=12)
    path, averages, _ = passes.extended()
    states = [load(file) for file in family]
    shares = torch.ones(COUNT, dtype=torch.float64) / COUNT
    known = true = 0.0
    with open_analysis(path, passes.inputs) as more:
        for index, layer in enumerate(more.layers):
            if layer.rows is None:
                mean = torch.tensordot(
                    shares, torch.stack([state[layer.key].double() for state in states]), 1
                )
                true += float((averages[layer.key].double() - mean).square().sum())
                known += float(more.grams[index][-1, -1])
    assert known == pytest.approx(true, rel=0.02)


def test_no_layer_is_read_again(family, tmp_path, monkeypatch):
    passes, again = Passes(tmp_path, family), []
    analyze = extension.analyze_tensor

    def noted(inputs, key, *arguments):
        again.append(key)
        return analyze(inputs, key, *arguments)

    monkeypatch.setattr(extension, "analyze_tensor", noted)
    passes.extended()
    treatments = passes.inputs.layout.treatments
    assert {treatments[key] for key in again} == {Treatment.AVERAGE}


def test_the_average_that_was_written_before_is_the_one_it_is_about(family, tmp_path):
    passes = Passes(tmp_path, family, "bfloat16")
    key = next(layer.key for layer in passes.inputs.layout.layers)
    _, averages, _ = passes.full()
    moved = dict(averages)
    moved[key] = averages[key] * 1.5
    written = passes.write_average(moved, "written")
    passes.run(passes.inputs, passes.widths, extend_analysis(passes.earlier, written), "extended")
    path = analysis_path(tmp_path / "extended", passes.inputs, passes.widths)
    with open_analysis(path, passes.inputs) as more:
        index = next(i for i, layer in enumerate(more.layers) if layer.key == key)
        expected = float(moved[key].double().sub(averages[key].double()).square().sum())
        assert float(more.grams[index][-1, -1]) == pytest.approx(expected, rel=0.05)


def test_a_copy_of_an_old_checkpoint_is_recognised_in_the_rest(family, tmp_path, narrow):
    copies = [tmp_path / path.name for path in family]
    for path, copy in zip([*family[:-1], family[0]], copies, strict=True):
        copy.write_bytes(path.read_bytes())
    passes = Passes(tmp_path, copies, "float32", width=16, old_count=COUNT - 1)
    path, _, _ = passes.extended()
    with open_analysis(path, passes.inputs) as more:
        to_deviations = passes.inputs.contrasts.to_deviations
        grams = to_deviations @ more.grams[:, :-1, :-1].sum(0) @ to_deviations.mT
        distance = float(grams[0, 0] + grams[-1, -1] - 2 * grams[0, -1])
        assert distance < 1e-3 * float(grams[0, 0])


def test_the_limits_are_of_the_rounding_and_of_the_bases(family, tmp_path, narrow):
    def limits(kind, width):
        folder = tmp_path / f"{kind} {width}"
        folder.mkdir()
        passes = Passes(folder, family, kind, width)
        return limits_of(passes.earlier, passes.inputs, Progress())

    wide, fine, coarse, small = (
        limits(*pair)
        for pair in (("plain", WIDE), ("float32", 20), ("bfloat16", 12), ("plain", 12))
    )
    assert wide.unknown < 1e-3 < fine.unknown < small.unknown
    assert wide.wrong < 1e-3
    assert fine.wrong < 1e-4 < coarse.wrong
    assert coarse.wrong == pytest.approx(8 * small.wrong, rel=0.1)  # eight times the rounding
    assert wide.refusal is None
    assert "rounded so that" in ExtensionLimits(0.02, 0.1).refusal
    assert "lie outside of" in ExtensionLimits(0.001, 0.6).refusal


def test_other_proportions_of_the_old_checkpoints_are_refused():
    old, new = contrasts.around_mean([1, 1]), contrasts.around_mean([1, 2, 1])
    with pytest.raises(ValueError, match="other proportions"):
        Extension.of(old, new)


def test_an_extension_gives_the_deviations_of_all():
    generator = torch.Generator().manual_seed(0)
    checkpoints = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    weights = [2.0, 1, 3, 1, 1]
    old, new = contrasts.around_mean(weights[:3]), contrasts.around_mean(weights)
    shares = torch.tensor(weights, dtype=torch.float64)
    average = shares[:3] @ checkpoints[:3] / shares[:3].sum()
    error = 0.1 * torch.randn(7, generator=generator, dtype=torch.float64)
    slices = old.to_deviations.mT @ (checkpoints[:3] - average)
    rows = torch.cat([slices, error[None], checkpoints[3:] - (average + error)])
    found = new.to_deviations @ Extension.of(old, new).to_slices @ rows
    expected = checkpoints - shares @ checkpoints / shares.sum()
    torch.testing.assert_close(found, expected)
