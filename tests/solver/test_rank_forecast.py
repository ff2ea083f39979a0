"""The forecast before anything is solved: ranks go where the merge will spread them."""

from dataclasses import replace

import torch
from torch.testing import assert_close

from hyper_merge.solver.rank_forecast import RankForecast


def two_layers(weights):
    """Two checkpoints, one direction between them, and layers with energies 5 and 4 before weights."""
    first, second = torch.tensor(weights).double()
    values = (
        torch.tensor([4.0, 1.0]).double() * first,
        torch.tensor([3.0, 1.0]).double() * second,
    )
    return RankForecast(
        names=("a", "b"),
        mixtures=tuple((value,) for value in values),
        private=tuple((value / 2, value / 2) for value in values),
        multipliers=(torch.full((2, 1), 0.5**0.5).double(),) * 2,
        energies=torch.full((2,), float(5 * first + 4 * second) / 2).double(),
        costs=(10, 10),
    )


def test_layer_weights_decide_where_ranks_go_and_what_they_explain():
    for weights, first in (([1.0, 1.0], 4 / 9), ([1.0, 2.0], 6 / 13)):
        forecast = two_layers(weights)
        assert_close(forecast.explained_by_shared(10), torch.full((2,), first).double())
        shared, _ = forecast.curves([9, 10, 40])
        assert_close(shared[:, 0], torch.tensor([0.0, first, 1.0]).double())


def test_ranks_for_many_sizes_are_about_those_for_each():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(9, 3, 40, generator=generator, dtype=torch.float64).cumsum(2).flip(2)
    values *= torch.tensor([1.0, 0.4, 0.002])[:, None]  # the last direction is hardly worth a file
    forecast = RankForecast(
        names=("a", "b", "c", "d"),
        mixtures=tuple(tuple(layer) for layer in values),
        private=tuple((torch.ones(1).double(),) * 4 for _ in values),
        multipliers=(torch.eye(4, 3).double(),) * 9,
        energies=torch.full((4,), float(values.sum())).double(),
        costs=(10, 20, 10, 20, 10, 20, 10, 20, 10),
    )
    sizes = [500, 1000, 5000, 8000, 15_000]
    ranks = forecast.rank_curve(sizes)
    for approximate, size in zip(ranks, sizes, strict=True):
        exact = forecast.ranks_for(size)
        assert len(approximate) == len(exact)
        assert_close(torch.tensor(approximate), torch.tensor(exact), atol=1, rtol=0)
    assert {len(row) for row in ranks} == {1, 2}


def test_private_forecasts_count_layers_like_shared_ones():
    forecast = two_layers([1.0, 9.0])
    assert_close(forecast.explained_by_private(20), torch.full((2,), 27 / 41).double())
    assert_close(forecast.curves([20])[1][0], torch.full((2,), 27 / 41).double())


def test_a_target_counts_explained_shares_with_weights():
    assert two_layers([1.0, 9.0]).budget_for(0.65) == 10  # 27 of 41, by the second layer
    assert two_layers([1.0, 1.0]).budget_for(0.65) == 20


def test_checkpoints_that_share_nothing_get_a_lora_each():
    steep = torch.tensor([9.0, 1.0]).double()
    forecast = RankForecast(
        names=("a", "b", "c"),
        mixtures=((torch.tensor([7.0, 6.0, 1.0]).double(), torch.tensor([7.0, 6.0]).double()),),
        private=((steep, steep, 2 * steep),),
        multipliers=(torch.eye(3, 2).double(),),
        energies=torch.full((3,), 12.0).double(),
        costs=(10,),
    )
    assert forecast.ranks_for(20) == (1, 1, 1)  # 18 + 9, and not 7 + 7
    assert replace(forecast, file_bytes=5).ranks_for(20) == (1,)  # three files have no room


def test_bytes_of_files_decide_how_many_loras_are_worth_it():
    both = torch.tensor([9.0]).double(), torch.tensor([8.0]).double()
    forecast = RankForecast(
        names=("a", "b", "c"),
        mixtures=(both,) * 2,
        private=((torch.tensor([6.0]).double(),) * 3,) * 2,
        multipliers=(torch.eye(3, 2).double(),) * 2,
        energies=torch.full((3,), 12.0).double(),
        costs=(10, 10),
    )
    assert forecast.ranks_for(40) == (1, 1)
    entries = replace(forecast, entries=(5, 5))
    assert entries.ranks_for(60) == (1, 1)
    assert replace(entries, file_bytes=40).ranks_for(80) == (1,)
    assert replace(entries, file_bytes=10).ranks_for(80) == (1, 1)


def checkpoints_of_a_layer(private, count=3):
    """Checkpoints of one layer, whose two mixtures hold all there is; every private one holds some values."""
    values = torch.tensor(private).double()
    mixtures = torch.full((6,), 4.0).double(), torch.tensor([8.0, 1.0]).double()
    return RankForecast(
        names=tuple("abcdefghi"[:count]),
        mixtures=(mixtures,),
        private=((values,) * count,),
        multipliers=(torch.eye(count, 2).double(),),
        energies=torch.full((count,), 33.0 / count).double(),
        costs=(10,),
    )


def test_as_many_loras_as_checkpoints_where_private_ones_are_nearly_as_good():
    # Of 33 mixtures leave 5 and private LoRAs 9: 1.8 times as much. Then 15: three times.
    assert len(checkpoints_of_a_layer([5.0, 3.0]).ranks_for(60)) == 3
    assert len(checkpoints_of_a_layer([4.0, 2.0]).ranks_for(60)) == 2


def test_the_curve_of_sizes_takes_as_many_loras_too():
    for private in ([5.0, 3.0], [4.0, 2.0]):
        forecast = checkpoints_of_a_layer(private)
        assert forecast.rank_curve([60]) == [forecast.ranks_for(60)]


def test_no_prompt_gets_more_tags_than_eight_for_a_little():
    assert len(checkpoints_of_a_layer([4.0], 8).ranks_for(60)) == 8
    assert len(checkpoints_of_a_layer([4.0], 9).ranks_for(60)) == 2
