"""Private LoRAs as a start leave what dense truncated SVDs leave, and mixtures begin with shared directions."""

import torch
from tiny_family import merge, recipe
from torch.testing import assert_close

from hyper_merge.analysis.store import open_analysis
from hyper_merge.decomposition.initialization import mixed_start
from hyper_merge.decomposition.ll1 import compute_statistics
from hyper_merge.operations.merge.plan import find_known_analysis
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.operations.merge.rank_plan import plan_ranks
from hyper_merge.solver.metric import Metric
from hyper_merge.solver.private_start import plan_private_start


def test_private_start_leaves_at_most_what_it_says(files, tmp_path):
    settings = {"ranks": (3, 2, 1), "fit_weights": (1, 1, 3)}
    merge(files, tmp_path, **settings)
    preflight = run_preflight(recipe(files, tmp_path, **settings))
    plan = plan_ranks(preflight.recipe, preflight.inputs)
    with open_analysis(find_known_analysis(preflight), preflight.inputs) as analysis:
        metric = Metric.of(analysis, preflight.recipe)
        start = plan_private_start(metric, 3, plan.allowance)
        assert plan_private_start(metric, 2, plan.allowance) is None
        left = 0.0
        for name, members in plan.groups.items():
            group = start.group(name, metric, members, torch.device("cpu"), lambda: None)
            statistics = compute_statistics(group.problem, group.factors)
            left += statistics.loss(group.multipliers) * group.problem.energy
        total = metric.energy(range(len(metric.layers)))
    assert plan.allowance.size(start.ranks) <= plan.allowance.budget
    assert 0 < left / total <= start.loss * (1 + 1e-3)


def test_mixed_start_has_shared_directions_and_the_rest():
    gram = torch.diag(torch.tensor([9.0, 4.0, 1.0]).double())
    private = torch.tensor([[1.0, 0.9, 0, 0], [0, 0, 1, 0.1], [0, 0, 0, 1]]).double()
    start = mixed_start(gram, private, 3)
    assert_close(start[:, 0].abs(), torch.tensor([1.0, 0, 0]).double())
    assert_close(start[:, 1], private[:, 2])  # of which the first direction leaves most
    assert_close(start[:, 2], private[:, 3] / private[:, 3].norm())
    assert_close(mixed_start(gram, private, 6).norm(dim=0)[:6] > 0, torch.tensor([True] * 6))
