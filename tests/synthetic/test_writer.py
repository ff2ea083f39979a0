"""The families of made-up checkpoints are what their specification plans."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import Treatment, layout_of
from hyper_merge.checkpoints.reader import read_header
from hyper_merge.errors import OutputError
from hyper_merge.synthetic.checkpoint_layouts import sd1_layout
from hyper_merge.synthetic.writer import NARROW, FamilySpec, mixture, tensors, write_family

SMALL = replace(NARROW, count=3, width=8, context=16, vocabulary=20, vae_width=4, terms=8)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("family"), SMALL)


@pytest.fixture(scope="module")
def layers(family):
    header = read_header(family[0])
    treatments = layout_of(header, require_supported(header)).treatments
    return [key for key, treatment in treatments.items() if treatment is Treatment.LAYER]


def centred(stack):
    deviations = stack.double().flatten(1)  # (k, m n)
    return deviations - deviations.mean(0)


def layer_grams(spec, layers):
    """Returns inner products of the deviations from the mean, (layers, k, k)."""
    exact = dict(tensors(spec))
    return torch.stack([centred(exact[key]) @ centred(exact[key]).T for key in layers])


def test_synthetic_files_have_the_real_sd1_layout(family, layers):
    assert [path.name for path in family] == [f"synthetic_{c}.safetensors" for c in range(3)]
    for path in family:
        header = read_header(path)
        assert require_supported(header).name == "sd1"
        assert len(header.tensors) == 1131
        types = {info.dtype for key, info in header.tensors.items() if "position_ids" not in key}
        assert types == {torch.float16}
    assert len(layers) == 278 + 4 + 72


def test_the_files_hold_the_exact_numbers_rounded_once(family):
    files = [load_file(path) for path in family]
    exact = dict(tensors(SMALL))
    assert list(exact) == list(sd1_layout())
    for key, stack in exact.items():
        expected = stack if key.endswith("position_ids") else stack.half()
        assert torch.equal(torch.stack([file[key] for file in files]), expected), key


def test_a_familys_bytes_follow_its_seed(family, tmp_path):
    again = write_family(tmp_path / "again", SMALL)
    other = write_family(tmp_path / "other", replace(SMALL, seed=1))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in family]
    assert not {path.read_bytes() for path in other} & {path.read_bytes() for path in family}


def test_a_larger_family_begins_with_the_smaller_one(family, tmp_path):
    larger = write_family(tmp_path, replace(SMALL, count=4))
    assert [path.read_bytes() for path in larger[:3]] == [path.read_bytes() for path in family]
    assert torch.equal(mixture(replace(SMALL, count=4))[:3], mixture(SMALL))


def test_without_noise_every_layer_mixes_the_latents_as_planned(layers):
    spec = replace(SMALL, count=5, latents=2, own=0.0, noise=0.0)
    grams = layer_grams(spec, layers)
    planted = mixture(spec).double()
    span = torch.linalg.qr(planted - planted.mean(0))[0]  # (k, latents)
    inside = torch.einsum("ka,lkj,ja->l", span, grams, span)
    whole = grams.diagonal(dim1=1, dim2=2).sum(1)
    assert float((inside / whole).min()) > 1 - 1e-9
    assert float((torch.linalg.eigvalsh(grams)[:, -2] / whole).min()) > 1e-3


def test_the_gram_matrix_reveals_one_latents_multipliers(layers):
    spec = replace(SMALL, count=6, latents=1, own=0.0, noise=0.0)
    vector = torch.linalg.eigh(layer_grams(spec, layers).sum(0))[1][:, -1]
    planted = mixture(spec).double()[:, 0]
    planted -= planted.mean()
    planted /= planted.norm()
    torch.testing.assert_close(vector * (vector @ planted).sign(), planted, atol=1e-6, rtol=0)


def test_a_latent_has_its_rank_and_spectrum():
    spec = replace(SMALL, count=2, latents=1, own=0.0, noise=0.0, alpha=1.0, terms=4)
    key = "model.diffusion_model.middle_block.1.proj_in.weight"
    stack = dict(tensors(spec))[key]
    values = torch.linalg.svdvals(centred(stack)[0].reshape(stack.shape[1], -1))
    assert values[spec.terms] < 1e-5 * values[0] < values[spec.terms - 1]
    falling = values[: spec.terms] / values[0]
    planned = torch.arange(1, spec.terms + 1, dtype=torch.float64) ** -1.0
    torch.testing.assert_close(falling, planned, atol=0, rtol=0.5)


def test_own_and_noise_have_their_planned_norms(layers):
    alone = replace(SMALL, latents=0, spread=0.0)
    for spec in (replace(alone, noise=0.0, own=0.4), replace(alone, own=0.0, noise=0.4)):
        exact = dict(tensors(spec))
        shares = torch.tensor(
            # Two independent deviations differ by sqrt(2) of one.
            [(exact[k][0] - exact[k][1]).norm() / exact[k][0].norm() / math.sqrt(2) for k in layers]
        )
        assert float(shares.median()) == pytest.approx(0.4 * spec.size, rel=0.1)


def test_the_amplitudes_of_the_layers_are_log_normal(layers):
    exact = dict(tensors(replace(SMALL, latents=0, own=0.0, noise=1.0)))
    logs = torch.stack(
        [
            ((exact[key][0] - exact[key][1]).norm() / exact[key][0].norm() / math.sqrt(2)).log()
            for key in layers
        ]
    )
    assert float(logs.median().exp()) == pytest.approx(SMALL.size, rel=0.15)
    assert float(logs.std()) == pytest.approx(SMALL.spread, rel=0.15)


def test_the_vae_differs_only_on_request():
    same, different = dict(tensors(SMALL)), dict(tensors(replace(SMALL, vae_differs=True)))
    norm = "model.diffusion_model.out.0.weight"
    step = (same[norm] - same[norm].mean(0)).norm() / same[norm].norm()
    assert 0 < float(step) < SMALL.size / 2
    assert same[norm].mean() == pytest.approx(1, abs=0.1)
    for key, stack in same.items():
        if key.startswith("first_stage_model."):
            assert torch.equal(stack[0], stack[1]), key
            assert not torch.equal(different[key][0], different[key][1]), key
        elif key.endswith("position_ids"):
            assert torch.equal(stack, torch.arange(77).expand(3, 1, 77))
        else:
            assert not torch.equal(stack[0], stack[1]), key


def test_progress_reaches_the_total_and_names_are_kept(tmp_path):
    seen = []
    spec = replace(SMALL, count=1)
    paths = write_family(tmp_path, spec, ["only"], lambda *step: seen.append(step))
    assert [path.name for path in paths] == ["only.safetensors"]
    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert len(seen) == 1131
    total = sum(info.numel for info in read_header(paths[0]).tensors.values())
    assert {step[1] for step in seen} == {total}
    assert done[-1] == total


def test_a_wrong_number_of_names_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3 checkpoints need as many names, got 2"):
        write_family(tmp_path, SMALL, ["a", "b"])


def test_existing_files_stay_unless_overwriting(tmp_path):
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(OutputError):
        write_family(tmp_path, SMALL, ["a", "b", "c"])
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    paths = write_family(tmp_path, SMALL, ["a", "b", "c"], overwrite=True)
    assert len(load_file(paths[1])) == 1131


def test_an_interrupt_leaves_nothing_behind(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_family(tmp_path / "new", SMALL, on_progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_are_the_real_sizes():
    spec = FamilySpec()
    assert (spec.width, spec.context, spec.vocabulary, spec.vae_width) == (320, 768, 49408, 128)
