"""The forecast before anything is solved: ranks go where the merge will spread them."""

import torch
from torch.testing import assert_close

from hyper_merge.solver.rank_forecast import RankForecast


def two_layers(weights):
    """Two checkpoints, one direction between them, and layers with energies 5 and 4."""
    values = (torch.tensor([4.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double())
    return RankForecast(
        names=("a", "b"),
        mixtures=tuple((value,) for value in values),
        private=tuple((value / 2, value / 2) for value in values),
        multipliers=(torch.full((2, 1), 0.5**0.5).double(),) * 2,
        energies=torch.full((2,), 4.5).double(),
        weights=torch.tensor(weights).double(),
        costs=(10, 10),
    )


def test_layer_weights_decide_where_ranks_go():
    plain, relative = two_layers([1.0, 1.0]), two_layers([1.0, 2.0])
    for forecast, first in ((plain, 4.0), (relative, 3.0)):
        assert_close(forecast.explained_by_shared(10), torch.full((2,), first / 9).double())
        shared, _ = forecast.curves([9, 10, 40])
        assert_close(shared[:, 0], torch.tensor([0.0, first / 9, 1.0]).double())


def test_layer_weights_do_not_change_private_forecasts():
    plain, relative = two_layers([1.0, 1.0]), two_layers([1.0, 9.0])
    assert_close(relative.explained_by_private(20), plain.explained_by_private(20))
    assert_close(relative.curves([20])[1], plain.curves([20])[1])


def test_a_target_counts_explained_shares_without_weights():
    forecast = two_layers([1.0, 9.0])
    assert forecast.budget_for(0.44) == 20  # 3 + 1 of the second layer
    assert two_layers([1.0, 1.0]).budget_for(0.44) == 10
