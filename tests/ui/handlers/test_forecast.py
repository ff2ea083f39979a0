"""The forecast before a merge: the curve, its button, and dissimilar groups."""

import html
import json
import re
from dataclasses import replace

import pytest
import torch
from at_the_tab import NAMES, ended, values, words
from tiny_family import snapshot

from hyper_merge.decomposition.clustering import Clusters, find_clusters
from hyper_merge.hosts import tasks
from hyper_merge.operations.catalogue import Catalogue
from hyper_merge.operations.merge.plan import ForecastCurve, forecast_curve, make_plan
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.form import Form
from hyper_merge.ui.handlers.forecast import pick_group, start_forecast, update_group_buttons
from hyper_merge.ui.handlers.merge_request import preflight_form
from hyper_merge.ui.handlers.picker import show_plan
from hyper_merge.ui.handlers.saved_forms import restore_form


def examined(host, **changes):
    return preflight_form(host, Form.from_widgets(*values(name="new", **changes)))


@pytest.fixture
def looked(host, jobs):
    """Makes the forecast of the files."""
    assert start_forecast(host, jobs, *values(name="new")) == ""
    assert ended(jobs).outcome == "done"


def drawn(host, **changes):
    """What the scripts are told of the size, and the button."""
    _, _, choice, button, *_ = show_plan(host, Catalogue(), "", *values(name="new", **changes))
    return json.loads(html.unescape(re.search('data-choice="([^"]*)"', choice)[1])), button


def test_before_a_forecast_the_size_of_ranks_is_known_and_a_look_is_offered(host):
    choice, button = drawn(host, ranks="4, 2")
    assert choice.keys() == {"text", "size", "asked"}
    assert (choice["text"], choice["asked"]) == ("4, 2", "4, 2")
    assert drawn(host, ranks="small")[0]["asked"] == "40, 40, 40"
    assert 10_000 < choice["size"] < 100_000
    assert button["visible"] is True
    assert button["value"] == "First see what each size would explain (a few seconds)"
    assert drawn(host, ranks="50 kB")[0]["size"] == 50_000
    assert drawn(host, ranks="95 %")[0]["size"] is None


def test_a_forecast_writes_only_the_cache(host, jobs, root):
    before = snapshot(root)
    start_forecast(host, jobs, *values(name="new"))
    assert ended(jobs).outcome == "done"
    assert snapshot(root) == before
    assert list((root / "hyper-merge/cache").glob("*.safetensors"))
    later = restore_form(host, jobs, "", *values(checkpoints=[]))
    assert later == tuple(values(name="new")), "for a page that comes later"


def test_a_forecast_of_one_checkpoint_is_refused(host, jobs):
    answer = start_forecast(host, jobs, *values(checkpoints=NAMES[:1]))
    assert "two or more checkpoints" in words(answer)
    assert jobs.last is None


@pytest.mark.usefixtures("looked")
def test_ranks_size_and_share_of_a_curve_agree(host):
    choice, button = drawn(host, ranks="4, 2")
    assert button["visible"] is False
    forecast = tasks.known_forecast(examined(host))
    assert choice["sizes"] == [*forecast.sizes]
    assert choice["size"] == forecast.requested_size(examined(host, ranks="4, 2"))
    assert choice["worst"] == [round(min(shares), 5) for shares in forecast.shared]
    assert choice["names"][0] == forecast.names[forecast.shared[0].index(min(forecast.shared[0]))]
    assert len(choice["ranks"]) == len(choice["mean"]) == len(forecast.sizes)
    ranks = [sum(map(int, text.split(", "))) for text in choice["ranks"]]
    assert ranks == sorted(ranks)
    size = drawn(host, ranks="50 kB")[0]["size"]
    assert size == 50_000
    assert drawn(host, ranks="1 %")[0]["size"] == forecast.size_for(0.01)


@pytest.mark.usefixtures("looked")
def test_invalid_ranks_leave_the_curve_without_size(host):
    choice, _ = drawn(host, ranks="4, x")
    assert (choice["text"], choice["size"]) == ("4, x", None)
    assert choice["sizes"]


@pytest.mark.usefixtures("looked")
def test_layer_weighting_changes_the_forecast(host):
    plain, relative = (
        tasks.known_forecast(examined(host, layer_weights=weighting)).shared
        for weighting in ("all alike", "relative to each layer's size")
    )
    assert plain != relative


@pytest.mark.usefixtures("looked")
def test_the_forecast_agrees_with_the_plan(host):
    preflight = examined(host, layer_weights="all alike")
    forecast = tasks.known_forecast(preflight)
    point = make_plan(preflight, Progress()).requested
    torch.testing.assert_close(
        torch.tensor(forecast.at(point.size)), torch.tensor(point.shared), atol=0.02, rtol=0
    )
    assert [*forecast.sizes] == sorted(forecast.sizes)
    for shares in (forecast.shared, forecast.private):
        assert (torch.tensor(shares).diff(dim=0) >= -1e-12).all()


@pytest.mark.usefixtures("looked")
def test_the_size_for_a_share_serves_the_worst(host):
    forecast = tasks.known_forecast(examined(host))
    target = (min(forecast.shared[5]) + min(forecast.shared[6])) / 2
    size = forecast.size_for(target)
    assert forecast.sizes[5] < size < forecast.sizes[6]
    assert min(forecast.at(size)) == pytest.approx(target, abs=0.02)
    assert forecast.size_for(1.1) is None


def test_an_analysis_that_is_gone_is_no_error(host, jobs, monkeypatch):
    monkeypatch.setattr(tasks, "find_known_analysis", lambda *rest: host.folders().cache / "gone")
    assert tasks.known_forecast(examined(host)) is None


def two_groups(names):
    parted = Clusters(((0, 2), (1, 3)), 0.9)
    return ForecastCurve(tuple(names), (1, 2), ((0.0,) * 4, (0.5,) * 4), ((0.0,) * 4,) * 2, parted)


def test_dissimilar_groups_keep_their_buttons():
    picked = ["a", "b", "c", "d"]
    groups, *buttons = update_group_buttons(picked, two_groups(picked), "")
    assert json.loads(groups) == [["a", "c"], ["b", "d"]]
    assert [button["visible"] for button in buttons] == [True, True, False, False]
    assert json.loads(pick_group(1, groups)) == ["b", "d"]
    kept, *_ = update_group_buttons(["c", "a"], None, groups)
    assert kept == groups
    gone, *buttons = update_group_buttons(["a"], None, groups)
    assert (gone, any(button["visible"] for button in buttons)) == ("[]", False)


@pytest.mark.parametrize("groups", ["", "[]"])
def test_a_group_that_has_gone_picks_nothing(groups):
    assert pick_group(0, groups) == "[]"


def test_alike_checkpoints_are_one_group():
    picked = ["a", "b", "c", "d"]
    alike = replace(two_groups(picked), groups=Clusters(((0, 1, 2, 3),), 0.0))
    assert update_group_buttons(picked, alike, "")[0] == "[]"


def gram_of(rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    return rows @ rows.T


def test_two_trios_are_two_groups():
    rows = [[5, 0.1, 0], [5, -0.1, 0], [5, 0, 0.1], [-5, 0, 0.1], [-5, 0.1, 0], [-5, 0, -0.1]]
    clusters = find_clusters(gram_of(rows))
    assert clusters.groups == ((0, 1, 2), (3, 4, 5))
    points = torch.tensor(rows, dtype=torch.float64)
    within = sum(
        float((points[i : i + 3] - points[i : i + 3].mean(0)).square().sum()) for i in (0, 3)
    )
    total = float((points - points.mean(0)).square().sum())
    assert clusters.between == pytest.approx(1 - within / total)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_unrelated_or_equal_checkpoints_are_one_group(count):
    assert not find_clusters(torch.eye(count, dtype=torch.float64)).are_apart
    assert not find_clusters(torch.zeros(count, count, dtype=torch.float64)).are_apart


def test_the_base_does_not_change_the_groups():
    rows = [[5.0, 0.1], [5.0, -0.1], [-5.0, 0.1], [-5.0, -0.1]]
    moved = [[x + 7, y - 3] for x, y in rows]
    assert (
        find_clusters(gram_of(rows)).groups
        == find_clusters(gram_of(moved)).groups
        == ((0, 1), (2, 3))
    )


def test_a_forecast_is_read_from_the_analysis(host, jobs):
    preflight = examined(host)
    start_forecast(host, jobs, *values(name="new"))
    ended(jobs)
    path = tasks.find_known_analysis(preflight)
    forecast = forecast_curve(path, preflight, Progress())
    assert forecast.names == ("a", "b", "c")
    assert min(forecast.shared[-1]) > 0.99
