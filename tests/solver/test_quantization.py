"""LoRAs stored in a type of their own: what the report says of them is what is in the files."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from narrow_layouts import NARROW
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_family import added, layers_of, load, merge, part_multiplier, recipe, tags_of

from hyper_merge.analysis.contents import Analysis
from hyper_merge.checkpoints.architectures.families.sd1 import SD1
from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.normalization import balance
from hyper_merge.decomposition.stretch import LayerMetric, Stretch
from hyper_merge.errors import NonFiniteError, RecipeError
from hyper_merge.loras.lora_file import (
    as_hosts_apply,
    as_lora_weights,
    lora_bytes,
    lora_tensors,
    stored_factors,
)
from hyper_merge.loras.metadata import Lineage, LoraFile, lora_metadata
from hyper_merge.loras.prompt_tags import Tag
from hyper_merge.operations.merge.estimate import estimate_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.runtime.progress import Progress
from hyper_merge.runtime.scratch import Scratch
from hyper_merge.solver.float8 import float8_alpha
from hyper_merge.solver.quantization import quantize
from hyper_merge.solver.solution import LowRankSolution

FLOAT8 = torch.float8_e4m3fn
DTYPES = ("float16", "bfloat16", "float32", "float8")
LAYER = Layer("te.weight", "lora_te_q_proj", "text_encoder", (60, 50))


@pytest.fixture(scope="module")
def stored(tmp_path_factory, files):
    """A merge with LoRAs of each type, the hyper-model in float32."""
    folder = tmp_path_factory.mktemp("stored")
    return {
        word: merge(files, folder / word, dtype="float32", lora_dtype=word, allocation="even")
        for word in DTYPES
    }


def dense_loss(models, merged):
    """Returns the loss of the files on disk, with the exact multipliers."""
    base, loras = load(merged.place.hyper_model), {p.stem: load_file(p) for p in merged.loras}
    shared = replace(merged, loras=merged.loras[: len(merged.report.loras)])
    energy, error = 0.0, 0.0
    for path, row, figures in zip(models, tags_of(shared), merged.report.checkpoints, strict=True):
        checkpoint = load(path)
        if figures.topup:
            row.append(Tag(figures.topup, 1.0, 1.0))
        for layer in layers_of(path):
            rest = (checkpoint[layer.key].double() - base[layer.key].double()).flatten(1)
            energy += float(rest.square().sum())
            for tag in row:
                rest = rest - part_multiplier(tag, layer.part) * added(
                    loras[tag.name], layer.module
                )
            error += float(rest.square().sum())
    return error / energy


def factor_types(merged):
    return {
        tensor.dtype
        for path in merged.loras
        for key, tensor in load_file(path).items()
        if not key.endswith(".alpha")
    }


def random_factors(size, rank, seed=0, layer=LAYER):
    """Returns a balanced pair whose product has the largest singular value `size`."""
    generator = torch.Generator().manual_seed(seed)
    up, down = balance(
        torch.randn(layer.m, rank, generator=generator),
        torch.randn(rank, layer.n, generator=generator),
    )
    root = math.sqrt(size) / float(up[:, 0].norm())
    return up * root, down * root


def float8_values():
    """Returns the values from 0 to 448, rising: 4 bits of exponent with a bias of 7, 3 of fraction."""
    return [
        (code & 7) / 8 * 2.0**-6 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7)
        for code in range(127)
    ]


@pytest.mark.parametrize("word", DTYPES)
def test_the_reported_loss_holds_for_written_loras(files, stored, word):
    merged = stored[word]
    assert merged.report.loss == pytest.approx(dense_loss(files, merged), abs=1e-6)
    expected = FLOAT8 if word == "float8" else getattr(torch, word)
    assert factor_types(merged) == {expected}
    assert load_file(merged.place.hyper_model)[layers_of(files[0])[0].key].dtype == torch.float32


def test_adaptive_ranks_in_float8_lose_what_is_reported_too(files, tmp_path):
    merged = merge(files, tmp_path, lora_dtype="float8")
    assert factor_types(merged) == {FLOAT8}
    assert merged.report.loss == pytest.approx(dense_loss(files, merged), abs=1e-6)


def test_private_loras_in_float8_lose_what_is_reported(files, tmp_path):
    merged = merge(files, tmp_path, lora_dtype="float8", ranks=(3,), topup="3")
    topups = [
        load_file(merged.place.loras / f"{name}.safetensors") for name in merged.report.topups
    ]
    assert topups
    for tensors in topups:
        (alpha,) = {t.item() for key, t in tensors.items() if key.endswith(".alpha")}
        assert math.log2(alpha).is_integer()
        assert {t.dtype for key, t in tensors.items() if "weight" in key} == {FLOAT8}
    assert merged.report.loss == pytest.approx(dense_loss(files, merged), abs=1e-6)


def test_a_budget_is_kept_in_float8(files, tmp_path):
    merged = merge(files, tmp_path, lora_dtype="float8", ranks=(4, 2), budget="600kB")
    assert 480_000 < sum(path.stat().st_size for path in merged.loras) <= 600_000


def test_rounding_costs_little_in_every_type(stored):
    loss = stored["float32"].report.loss
    assert stored["float16"].report.loss == pytest.approx(loss, abs=1e-5)
    assert stored["bfloat16"].report.loss == pytest.approx(loss, abs=1e-3)
    # Two factors, each with a relative error of 2 ** -4 / root(3) at most: 0.0026 of what is explained.
    assert stored["float8"].report.loss < loss + 0.0026 * (1 - loss)


def test_loras_are_stored_like_the_hyper_model_by_default(files, tmp_path):
    merged = merge(files[:2], tmp_path, dtype="bfloat16", ranks=(2,))
    assert factor_types(merged) == {torch.bfloat16}


def test_a_float8_file_names_its_one_alpha(stored):
    for path in stored["float8"].loras:
        tensors = load_file(path)
        alphas = [tensor for key, tensor in tensors.items() if key.endswith(".alpha")]
        assert {alpha.dtype for alpha in alphas} == {torch.float32}
        (alpha,) = {float(alpha) for alpha in alphas}
        assert math.log2(alpha).is_integer()
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        assert float(metadata["ss_network_alpha"]) == alpha
        assert float(json.loads(metadata["ss_network_args"])["conv_alpha"]) == alpha
        assert metadata["hyper_merge.rank"] == path.stem.rpartition("-")[2]


def test_float8_products_reach_half_of_float16s_range(stored):
    for path in stored["float8"].loras:
        tensors = load_file(path)
        ups = {k: t.float().flatten(1) for k, t in tensors.items() if k.endswith("lora_up.weight")}
        norms = []
        for key, up in ups.items():
            down = tensors[key.replace("lora_up", "lora_down")].float().flatten(1)
            assert bool(up.isfinite().all())
            assert bool(down.isfinite().all())
            assert max(float(up.abs().max()), float(down.abs().max())) < 224
            assert float((up @ down).abs().max()) < 4e4
            norms.append(float(torch.linalg.matrix_norm(up @ down, 2)))
        assert 2**13 < max(norms) < 2**15 * 1.1


@pytest.mark.parametrize("share", [1.0, 1e-2, 1e-4, 1e-6])
def test_float8_keeps_a_far_smaller_layer(share):
    alpha = float8_alpha(8 * 1.0)
    up, down = random_factors(share, 8)
    stored_up, stored_down = stored_factors(LAYER, up, down, alpha, FLOAT8)
    found_up, found_down = as_hosts_apply(stored_up, stored_down, alpha)
    error = float((found_up @ found_down - up @ down).norm() / (up @ down).norm())
    assert 0.005 < error < (0.06 if share > 1e-5 else 0.25)


def test_float8_rounds_to_the_nearest_and_ties_to_even():
    values = torch.tensor(float8_values(), dtype=torch.float64)
    middles = (values[1:] + values[:-1]) / 2
    even = values[1:].where(torch.arange(len(middles)) % 2 == 1, values[:-1])
    for given_values, expected in (
        (values, values),
        (middles, even),
        (middles * (1 - 1e-6), values[:-1]),
        (middles * (1 + 1e-6), values[1:]),
    ):
        for sign in (1.0, -1.0):
            layer = Layer("x", "x", "unet", (len(given_values), 1))
            column = (sign * given_values).float()[:, None]
            stored, _ = stored_factors(layer, column, torch.ones(1, 1), 1.0, FLOAT8)
            assert torch.equal(stored.double()[:, 0], sign * expected)


@pytest.mark.parametrize("peak", [449.0, -1e6])
def test_a_factor_beyond_float8_is_refused_not_made_nan(peak):
    up = torch.full((60, 1), 448.0)
    assert bool((stored_factors(LAYER, up, up[:50].mT, 1.0, FLOAT8)[0].float() == 448).all())
    up[3] = peak
    message = r"lora_te_q_proj: a factor reaches .*, float8_e4m3fn files hold at most 448"
    with pytest.raises(NonFiniteError, match=message):
        stored_factors(LAYER, up, torch.ones(1, 50), 1.0, FLOAT8)


def test_alphas_of_float8_files_are_never_of_8_bits():
    tensors = as_lora_weights(LAYER, torch.ones(60, 2), torch.ones(2, 50), 0.25, FLOAT8)
    declared = lora_tensors([LAYER], [2], FLOAT8, 0.25)
    alpha = LAYER.module + ".alpha"
    assert (tensors[alpha].dtype, tensors[alpha].item()) == (torch.float32, 0.25)
    assert {key: info.dtype for key, info in declared.items()} == {
        key: tensor.dtype for key, tensor in tensors.items()
    }


def test_the_metadata_have_the_files_own_alpha():
    lineage = Lineage("mix", SD1, {}, (), "2025-05-06T07:08:09")
    file = LoraFile(lineage, "mix", 0, 1, 4, {"a": 1.0}, 0.75, FLOAT8, own_alpha=0.03125)
    metadata = lora_metadata(file, "mix_0-4", "")
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "0.03125"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "0.03125"}


def test_float8_accepts_a_block_without_rank():
    layers = (LAYER, Layer("x", "x", "unet", (40, 30)))
    pairs = [random_factors(3.0, 5), (torch.zeros(60, 0), torch.zeros(0, 50))]
    deviation = (pairs[0][0] @ pairs[0][1])[None]  # 2 and -1 times of which the checkpoints have
    bases = [(torch.eye(layer.m), torch.eye(layer.n)) for layer in layers]
    analysis = SimpleNamespace(
        layers=layers,
        contrasts=SimpleNamespace(dimensions=1),
        core=lambda index: deviation if index == 0 else torch.ones(1, 40, 30),
        rounding=lambda index: torch.zeros(layers[index].m, layers[index].n),
        bases=lambda index: bases[index],
        scratch=Scratch(),
        has_many=False,
    )
    analysis.products = partial(Analysis.products, analysis)
    analysis.maps = partial(Analysis.maps, analysis)
    solution = LowRankSolution(
        {0: pairs}, {"unet": torch.tensor([[2.0, 0.0], [-1.0, 0.0]]).double()}, ()
    )
    plain = [LayerMetric(1.0, Stretch.none(x.m), Stretch.none(x.n)) for x in layers]
    metric = SimpleNamespace(
        analysis=analysis,
        layers=plain,
        mixed=lambda core: core,
        to_deviations=torch.tensor([[2.0], [-1.0]]).double(),
    )
    groups = {"unet": [0, 1]}
    blocks = quantize(metric, solution, groups, (5.0, 3.0), FLOAT8, Progress())
    assert blocks.ranks == [(5, 0), (0, 0)]
    assert blocks.alphas == (float8_alpha(2 * 5 * 3.0), 1.0)
    assert {t.dtype for pairs in blocks.factors for pair in pairs for t in pair} == {FLOAT8}
    up, down = as_hosts_apply(*blocks.factors[0][0], blocks.alphas[0])
    torch.testing.assert_close(up @ down, 2 * pairs[0][0] @ pairs[0][1], atol=0.05, rtol=0.1)


def test_float8_takes_half_of_the_bytes_of_float16(files, stored, tmp_path):
    sizes = {}
    for word in ("float16", "float8"):
        tensors = [t for path in stored[word].loras for t in load_file(path).items()]
        sizes[word] = sum(t.nbytes for key, t in tensors if not key.endswith(".alpha"))
        settings = {"dtype": "float32", "lora_dtype": word, "allocation": "even"}
        estimate = estimate_merge(run_preflight(recipe(files, tmp_path, **settings)))
        assert estimate.loras == sum(t.nbytes for _, t in tensors)
    assert sizes["float8"] * 2 == sizes["float16"]


def planned(settings):
    """Returns the rank plan of a recipe."""
    preflight = run_preflight(settings)
    return plan_ranks(preflight.recipe, preflight.inputs)


def test_the_same_bytes_pay_for_twice_the_ranks(files, tmp_path):
    allowances = [
        planned(recipe(files, tmp_path, lora_dtype=word, ranks=ranks)).allowance
        for word, ranks in (("float16", (4, 2)), ("float8", (8, 4)))
    ]
    # The first convolution's bytes are set aside: it is one whole tensor in float32.
    half, quarter = ([cost for cost in x.costs if cost > 1] for x in allowances)
    assert [2 * cost for cost in quarter] == half
    assert allowances[1].budget <= allowances[0].budget  # small layers hold no more than they have
    sizes = [
        lora_bytes([LAYER], [ranks], dtype, ranks)
        for ranks, dtype in (((4, 2), torch.float16), ((8, 4), FLOAT8))
    ]
    assert sizes[0] + 2 * (4 - 2) == sizes[1]  # alphas in float32


def test_a_float8_file_names_its_dtype(stored):
    content = stored["float8"].loras[0].read_bytes()
    table = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    types = {key.rpartition(".")[2]: info["dtype"] for key, info in table.items() if key[0] != "_"}
    assert types == {"weight": "F8_E4M3", "alpha": "F32"}


def test_a_family_without_alphas_refuses_float8_before_any_work(tmp_path):
    models = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: torch.randn(shape, generator=generator)
            for key, shape in NARROW["sd3_medium"]().items()
        }
        models.append(tmp_path / f"{seed}.safetensors")
        save_file(tensors, models[-1])
    message = (
        "lora_dtype float8 needs LoRA files with alphas, and those of Stable Diffusion 3 .*hold"
        " none; choose float16 or bfloat16"
    )
    with pytest.raises(RecipeError, match=message):
        run_preflight(recipe(models, tmp_path, lora_dtype="float8"))
    assert planned(recipe(models, tmp_path, lora_dtype="bfloat16")).dtype == torch.bfloat16
    assert planned(recipe(models, tmp_path, lora_dtype="auto")).dtype == torch.float16


def decided(recipe):
    return run_preflight(recipe).recipe.lora_dtype


def test_loras_are_of_8_bits_by_default_where_they_load_and_lose_little(
    files, tmp_path, monkeypatch
):
    def by_default(**settings):
        return recipe(files, tmp_path, lora_dtype="auto", **settings)

    assert decided(by_default()) == "float8"
    assert decided(by_default(dtype="bfloat16")) == "float8"
    assert decided(by_default(dtype="float32")) == "same"
    assert decided(by_default(target=0.98)) == "float8"
    assert decided(by_default(target=0.99)) == "same"
    assert decided(recipe(files, tmp_path, lora_dtype="same")) == "same"
    monkeypatch.setattr("sys.platform", "darwin")
    assert decided(by_default()) == "same"
    assert decided(recipe(files, tmp_path, lora_dtype="float8")) == "float8"


def test_the_hyper_model_itself_is_never_of_8_bits(files, tmp_path):
    with pytest.raises(RecipeError, match='"dtype": expected one of float16, bfloat16, float32'):
        recipe(files, tmp_path, dtype="float8")
    with pytest.raises(
        RecipeError, match=r'"lora_dtype": expected one of auto, same, float16, .* float8'
    ):
        recipe(files, tmp_path, lora_dtype="fp8")
