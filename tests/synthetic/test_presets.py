"""The kinds of families have the structure that their names promise."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hyper_merge.checkpoints.architectures.detection import require_supported
from hyper_merge.checkpoints.architectures.layout import layout_of
from hyper_merge.checkpoints.io.header import Header, TensorInfo
from hyper_merge.synthetic.checkpoint_layouts import TEXT_PREFIX, UNET_PREFIX, sd1_layout
from hyper_merge.synthetic.family import FamilyPlan, weights
from hyper_merge.synthetic.presets import KINDS, narrow
from hyper_merge.synthetic.writer import NARROW, FamilySpec, mixture, tensors, write_family

TINY = {"width": 8, "context": 16, "vocabulary": 20, "vae_width": 4, "terms": 8}
SMALL = replace(NARROW, count=3, **TINY)
NORM = UNET_PREFIX + "out.0.weight"
EMBEDDING = TEXT_PREFIX + "embeddings.token_embedding.weight"
OTHERS = (
    NORM,
    EMBEDDING,
    TEXT_PREFIX + "embeddings.position_ids",
    "first_stage_model.encoder.conv_in.weight",
)
PINNED = {  # the first two numbers of each checkpoint
    UNET_PREFIX + "middle_block.1.proj_in.weight": [
        *(-0.26792896, 0.05027133, -0.27593127, -0.02106785, -0.28326371, 0.04676946)
    ],
    UNET_PREFIX + "input_blocks.3.0.op.weight": [
        *(0.07857265, -0.15956581, 0.10910014, -0.17415351, 0.15104708, -0.15906544)
    ],
    NORM: [*(0.89944941, 0.75320268, 0.89390582, 0.72214574, 0.91482019, 0.73854113)],
    TEXT_PREFIX + "encoder.layers.3.mlp.fc1.weight": [
        *(0.03256251, 0.09501212, 0.03508157, 0.19705351, 0.05596673, 0.16698357)
    ],
    EMBEDDING: [*(0.0062139, 0.01180577, 0.0062388, 0.01104962, 0.00575811, 0.01111933)],
}


def plans_of(spec):
    """Returns every ninth layer, and one of each other sort of tensor, which is quick."""
    shapes = sd1_layout(spec.width, spec.context, spec.vocabulary, spec.vae_width)
    infos = {
        key: TensorInfo(torch.int64 if key.endswith("position_ids") else spec.dtype, shape)
        for key, shape in shapes.items()
    }
    header = Header(Path("planned.safetensors"), infos, metadata={}, size=0, mtime_ns=0)
    layout = layout_of(header, require_supported(header))
    keys = [*(layer.key for layer in layout.layers[::9]), *OTHERS]
    return [FamilyPlan(key, infos[key], layout.treatments[key]) for key in keys]


def numbers(spec):  # key -> (k, *shape)
    return {plan.key: torch.stack(list(weights(spec, plan))) for plan in plans_of(spec)}


def layers_of(spec):  # key -> (k, m n), float64
    exact = numbers(spec)
    return {key: exact[key].double().flatten(1) for key in exact if key not in OTHERS}


def centred(stack):  # (k, ...)
    return stack - stack.mean(0)


def gram(layers):  # (k, k)
    return sum(centred(stack) @ centred(stack).T for stack in layers.values())


def cosines(spec):
    products = gram(layers_of(spec))
    norms = products.diagonal().rsqrt()
    return products * norms * norms[:, None]


def tiny(kind):
    return replace(KINDS[kind], **TINY)


def test_kinds_differ_in_seed_and_size():
    assert {"two", "shared", "many", "unrelated", "flat", "steep", "level"} < KINDS.keys()
    assert {"near_duplicates", "outlier", "groups", "merges"} < KINDS.keys()
    assert {spec.count for spec in KINDS.values()} >= {2, 4, 5, 6, 8, 12}
    seeds = [spec.seed for spec in KINDS.values()]
    assert len(set(seeds)) == len(seeds)


def test_the_first_kind_is_the_family_of_the_readme():
    assert KINDS["usual"] == FamilySpec()


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_kind_differs_in_sizes_alone(kind):
    full, small = KINDS[kind], narrow(KINDS[kind])
    assert (small.width, small.context, small.terms) == (64, 160, full.terms // 5)
    assert replace(small, **TINY) == replace(full, **TINY)


def test_merges_of_three_have_two_dimensions():
    for stack in layers_of(tiny("merges")).values():
        values = torch.linalg.svdvals(centred(stack))
        assert values[2] < 1e-6 * stack.norm()  # float32's rounding
        assert values[1] > 1e-2 * values[0]


def test_near_duplicates_are_two_trios():
    trios = cosines(tiny("near_duplicates")).view(2, 3, 2, 3).transpose(1, 2)
    assert float(torch.stack([trios[0, 0], trios[1, 1]]).min()) > 0.95
    assert float(trios[0, 1].max()) < -0.95


def test_groups_are_alike_within_and_unlike_between():
    parts = cosines(tiny("groups")).view(2, 4, 2, 4).transpose(1, 2)
    alike = torch.stack([parts[0, 0], parts[1, 1]])
    assert float(alike.mean()) > 0.3
    assert float(parts[0, 1].max()) < 0
    assert float(alike.min()) > float(parts[0, 1].max())


def test_an_outlier_has_most_of_all_differences():
    energies = gram(layers_of(tiny("outlier"))).diagonal()
    assert 0.6 < float(energies[4] / energies.sum()) < 0.99
    assert float(energies[:4].max() / energies[4]) < 0.2


def test_unrelated_ones_share_nothing():
    expected = torch.full((6, 6), -1 / 5).fill_diagonal_(1)  # about their mean
    torch.testing.assert_close(cosines(tiny("unrelated")), expected.double(), atol=0.15, rtol=0)


def test_many_have_most_of_their_differences_in_four_dimensions():
    shares = torch.linalg.eigvalsh(gram(layers_of(tiny("many")))).flip(0)
    assert 0.8 < float(shares[:4].sum() / shares.sum()) < 0.999
    assert float(shares[3] / shares[4]) > 3


def test_steep_families_need_fewer_ranks_than_flat_ones():
    key = UNET_PREFIX + "middle_block.1.proj_in.weight"
    shares = {}
    for kind in ("steep", "usual", "flat"):
        spec = replace(narrow(KINDS[kind]), vocabulary=20, vae_width=4)
        plan = replace(plans_of(spec)[-1], key=key, treatment=plans_of(spec)[0].treatment)
        plan = replace(plan, info=TensorInfo(spec.dtype, sd1_layout(64, 160)[key]))
        first = centred(torch.stack(list(weights(spec, plan))))[0].flatten(1)
        squares = torch.linalg.svdvals(first).square()
        shares[kind] = float(squares[:16].sum() / squares.sum())
    assert shares["steep"] > shares["usual"] + 0.1 > shares["flat"] + 0.2


def test_a_level_family_moves_all_layers_alike():
    spreads = {}
    for kind in ("usual", "level"):
        stacks = layers_of(tiny(kind)).values()
        logs = [(centred(stack).norm() / stack.norm()).log() for stack in stacks]
        spreads[kind] = float(torch.stack(logs).std())
    assert spreads["usual"] == pytest.approx(KINDS["usual"].spread, rel=0.3)
    assert spreads["level"] < 0.25


def test_uneven_layers_have_log_normal_norms():
    even, uneven = (numbers(replace(SMALL, gain_spread=gain)) for gain in (0.0, 0.5))
    logs = []
    for key, stack in even.items():
        if key in OTHERS:
            assert torch.equal(uneven[key], stack), key
            continue
        gain = uneven[key].norm() / stack.norm()
        torch.testing.assert_close(uneven[key], stack * gain, atol=1e-6, rtol=1e-4)
        logs.append(gain.log())
    assert float(torch.stack(logs).std()) == pytest.approx(0.5, rel=0.3)


def test_a_text_encoder_may_have_its_own_mixture():
    spec = replace(SMALL, count=5, latents=1, own=0.0, noise=0.0)
    apart = replace(spec, encoder="own")
    layers = layers_of(apart)
    for in_encoder in (True, False):
        part = {k: x for k, x in layers.items() if k.startswith(UNET_PREFIX) != in_encoder}
        assert len(part) > 5
        planted = centred(mixture(apart, in_encoder=in_encoder).double()[:, 0])
        vector = torch.linalg.eigh(gram(part))[1][:, -1]
        vector = vector * (vector @ planted).sign()
        torch.testing.assert_close(vector, planted / planted.norm(), atol=1e-5, rtol=0)
    assert torch.equal(mixture(apart), mixture(spec))
    assert not torch.equal(mixture(apart, in_encoder=True), mixture(apart))
    assert torch.equal(mixture(spec, in_encoder=True), mixture(spec))


def test_a_frozen_text_encoder_never_differs():
    frozen, usual = numbers(replace(SMALL, encoder="frozen")), numbers(SMALL)
    for key, stack in frozen.items():
        if key.startswith(UNET_PREFIX):
            assert torch.equal(stack, usual[key]), key
            assert not torch.equal(stack[0], stack[1]), key
        else:
            assert torch.equal(stack, stack[:1].expand_as(stack)), key


def test_scales_multiply_what_sets_a_checkpoint_apart():
    scaled, usual = numbers(replace(SMALL, scales=(1.0, 0.0, 3.0))), numbers(SMALL)
    for key in {NORM, EMBEDDING} | layers_of(SMALL).keys():
        base = scaled[key][1].double()
        expected = 3 * (usual[key][2].double() - base)
        atol = 2e-6 * float(base.abs().max())
        torch.testing.assert_close(scaled[key][2] - base, expected, atol=atol, rtol=1e-5)
        assert torch.equal(scaled[key][0], usual[key][0])


def test_a_given_mixture_equals_a_drawn_one(tmp_path):
    rows = tuple(tuple(row) for row in mixture(SMALL).tolist())
    copied = replace(SMALL, mix=rows, scales=(1.0, 1.0, 1.0))
    drawn, again = (
        write_family(tmp_path / name, spec) for name, spec in (("drawn", SMALL), ("given", copied))
    )
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in drawn]


def test_a_familys_numbers_stay_the_same():
    exact = dict(tensors(SMALL))
    for key, values in PINNED.items():
        numbers = exact[key].flatten(1)[:, :2].flatten().tolist()
        assert numbers == pytest.approx(values, rel=1e-4), key


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": ((1.0, 2.0, 3.0),) * 2}, "mix: expected 3 rows of 3"),
        ({"mix": ((1.0, 2.0),) * 3}, "mix: expected 3 rows of 3"),
        ({"scales": (1.0,)}, "scales: expected 3 numbers"),
        ({"encoder": "melted"}, "encoder: expected .*'frozen'.*, got 'melted'"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **settings)
