"""The start for many inputs: relatives are told by their cosines, and share what they have in common."""

import torch
from torch.testing import assert_close

from hyper_merge.decomposition.clustering import find_relatives
from hyper_merge.solver.many_start import (
    Components,
    StartBlock,
    mixture_choices,
    relatives_blocks,
    start_pairs,
)

K, P, Q = 6, 40, 50


def inputs(shared=True):
    """Returns inputs of rank 4: the first three have two of them in common, times 1, 2 and 3."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(P, 2, generator=generator) @ torch.randn(2, Q, generator=generator)
    matrices = []
    for c in range(K):
        own = torch.randn(P, 2, generator=generator) @ torch.randn(2, Q, generator=generator)
        matrices.append(own + (1 + c) * common if shared and c < 3 else own)
    return torch.stack(matrices)


def components(matrices):
    u, s, vh = torch.linalg.svd(matrices)
    ups = torch.cat([u[c, :, :4] * s[c, :4] for c in range(K)], 1)
    downs = torch.cat(list(vh[:, :4]))
    return Components(ups[None], downs[None], torch.arange(K).repeat_interleave(4))


def gram(matrices):
    flat = matrices.flatten(1).double()
    return flat @ flat.mT


def test_relatives_are_found_through_others():
    chain = torch.eye(5).double()
    for i, j in ((0, 2), (2, 4)):
        chain[i, j] = chain[j, i] = -0.2
    assert find_relatives(chain * 7) == [[0, 2, 4], [1], [3]]
    assert find_relatives(torch.zeros(3, 3).double()) == [[0], [1], [2]]


def test_choices_go_from_private_ones_to_mixtures_alone():
    assert mixture_choices(1) == [0]
    assert mixture_choices(2) == [0, 1, 2]
    assert mixture_choices(9) == [0, 1, 2, 4, 9]


def test_as_many_blocks_as_relatives():
    products = gram(inputs())
    for mixtures in (0, 1, 3):
        blocks = relatives_blocks(products, [0, 1, 2], mixtures)
        assert [block.is_mixture for block in blocks] == [True] * mixtures + [False] * (
            3 - mixtures
        )
        rows = torch.tensor([block.direction for block in blocks])
        assert_close(rows.square().sum(1), torch.ones(3))
        assert not rows[:, 3:].any()
    leading = torch.tensor(relatives_blocks(products, [0, 1, 2], 1)[0].direction[:3])
    assert_close(leading.abs(), torch.tensor([1.0, 2.0, 3.0]) / 14**0.5, atol=0.1, rtol=0)


def test_unrelated_inputs_begin_as_they_are():
    matrices = inputs(shared=False)
    alone = [StartBlock(tuple(row), is_mixture=False) for row in torch.eye(K).tolist()]
    for matrix, (up, down) in zip(
        matrices, start_pairs(components(matrices), alone, 8, 0)[0], strict=True
    ):
        assert_close(up @ down, matrix, atol=1e-4, rtol=1e-4)


def test_a_mixture_takes_what_is_common_and_the_rest_is_beside_it():
    matrices = inputs()
    blocks = relatives_blocks(gram(matrices), [0, 1, 2], 1)
    (up, down), *rest = start_pairs(components(matrices), blocks, 2, 0)[0]
    mixed = torch.tensordot(torch.tensor(blocks[0].direction), matrices, 1)
    best = torch.linalg.svdvals(mixed)[:2].square().sum()
    assert_close((up @ down).square().sum(), best, rtol=0.02, atol=0)
    for own, _ in rest:
        assert float((up.mT @ own).abs().max()) < 1e-3 * float(own.abs().max())


def test_layers_start_together_as_they_do_alone():
    matrices = inputs()
    one, other = components(matrices), components(3 * matrices.flip(1))
    sides = (one.ups, other.ups), (one.downs, other.downs)
    both = Components(*(torch.cat(side) for side in sides), one.owners)
    blocks = relatives_blocks(gram(matrices), [0, 1, 2], 1)
    blocks += [StartBlock(tuple(torch.eye(K)[c].tolist()), is_mixture=False) for c in (3, 4)]
    together = start_pairs(both, blocks, 12, 0)  # a rank at which nothing hangs on random numbers
    for pairs, layer in zip(together, (one, other), strict=True):
        for (up, down), alone in zip(pairs, start_pairs(layer, blocks, 12, 1)[0], strict=True):
            assert_close(up @ down, alone[0] @ alone[1], rtol=0, atol=1e-3)
            sizes = up.norm(dim=0) * down.norm(dim=1)
            assert bool((sizes.diff() <= 1e-4 * sizes[0]).all())


def test_an_input_that_hardly_counts_in_one_mixture_counts_in_another():
    matrices = inputs()
    pattern = [(1.0, 1e-60), (1e-60, 1.0)]
    blocks = [StartBlock((*row, *[0.0] * (K - 2)), is_mixture=True) for row in pattern]
    for matrix, (up, down) in zip(
        matrices, start_pairs(components(matrices), blocks, 4, 0)[0], strict=False
    ):
        assert_close(up @ down, matrix, atol=1e-3, rtol=0)


def test_blocks_of_inputs_alone_fall_also_where_bases_are_narrow():
    whole = components(inputs())
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (P, Q))
    narrow = Components(left.mT @ whole.ups, whole.downs @ right, whole.owners)
    alone = [StartBlock(tuple(row), is_mixture=False) for row in torch.eye(K).tolist()]
    for place, (up, down) in enumerate(start_pairs(narrow, alone, 8, 0)[0]):
        sizes = torch.linalg.svdvals(
            narrow.ups[0][:, whole.owners == place] @ narrow.downs[0][whole.owners == place]
        )[:4]
        assert_close(up.norm(dim=0) * down.norm(dim=1), sizes, rtol=1e-3, atol=1e-3)
