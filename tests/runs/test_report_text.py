"""The report's figures are those of dense arithmetic, and its table is laid out for people."""

import dataclasses
import json
import re

import pytest
import torch
from sample_report import REPORT
from tiny_family import layers_of, merge

from hyper_merge.runs.report import Report, TrainingReport
from hyper_merge.runs.report_text import format_report
from hyper_merge.solver.evaluation import Evaluation

TABLE = """\
mix: 2 checkpoints, 2 shared LoRAs

checkpoint         explained  in weights    UNet  text enc.  rel. error   not carried
anime                 81.25%      81.25%  80.00%    91.25%      0.4330        1.230%
a_long_checkpoint    100.00%     100.00% 100.00%   100.00%      0.0000        0.000%

explained: 90.62% as the mean over checkpoints, 81.25% at worst; 87.50% of all differences by the shared LoRAs (1 - loss)

loss: what stays unexplained, as a share of all differences in the layers
  average alone                     1.0000
  private LoRAs of the same bytes   0.2500
  shared LoRAs, as written          0.1250   1.25 times the bound
  lower bound                       0.1000
  by sweeps, before rounding: 0.5000 0.2500 0.1235

explained by the first LoRAs: 1, 2, ...
  mean   37.50%  90.62%
  worst  25.00%  81.25%

sections with the most of the loss: OUT02 50.0%, IN01 40.0%, TE00 10.0%

not carried by LoRAs, as a share of all differences: norms 0.500%, VAE 0.000%
end layers hold 3.00% of the differences in layers, as the loss weighs them, and are averaged only (exact ends would carry them)

4.26 GB of checkpoints -> hyper-model 2.13 GB + LoRAs 53 MB = 2.19 GB
"""


def test_the_table_is_laid_out_for_people():
    assert format_report(REPORT) == TABLE


LOSSES = """
weighted loss: what stays unexplained, layers weighed by output
  private LoRAs of the same bytes   0.3000
  shared LoRAs, as written          0.0750   1.50 times the bound
  lower bound                       0.0500
loss: what stays unexplained, as a share of all differences in the layers
  average alone                     1.0000
  shared LoRAs, as written          0.1250
  by sweeps, before rounding: 0.5000 0.2500 0.1235
"""
WEIGHTED = dataclasses.replace(
    REPORT,
    private_loss=None,
    bound=None,
    metric="output",
    weighted_loss=0.075,
    weighted_private_loss=0.3,
    weighted_bound=0.05,
)


def test_limits_stand_beside_the_loss_that_they_limit():
    assert LOSSES in format_report(WEIGHTED)
    without_loss = dataclasses.replace(WEIGHTED, loss=0.0)
    assert "average alone                     1.0000" in format_report(without_loss)


def test_a_weighted_report_comes_back_from_the_manifest():
    data = json.loads(json.dumps(WEIGHTED.as_dict(), allow_nan=False))
    assert (data["private_loss"], data["bound"]) == (None, None)
    assert Report.from_dict(data) == WEIGHTED


def test_an_earlier_report_has_plain_limits_beside_the_weighted_ones():
    data = {**WEIGHTED.as_dict(), "private_loss": 0.25, "bound": 0.1}
    report = Report.from_dict(json.loads(json.dumps(data)))
    text = format_report(report)
    assert (report.private_loss, report.bound) == (0.25, 0.1)
    assert "0.0750   1.50 times the bound\n" in text
    assert "0.1250   1.25 times the bound\n" in text
    assert text.count("  lower bound") == text.count("  private LoRAs") == 2


def test_the_greedy_method_counts_blocks_not_sweeps():
    greedy = Report(**dict(vars(REPORT), method="greedy", losses=(0.5,)))
    assert "\n  by blocks, before rounding: 0.5000\n" in format_report(greedy)


def test_a_first_version_reports_table_has_only_its_figures():
    old = Report(**dict(vars(REPORT), curve=(), similarity=(), parts=()))
    assert "the first LoRAs" not in format_report(old)
    assert "sections" not in format_report(old)


def test_a_report_comes_back_from_the_manifest():
    data = REPORT.as_dict()
    assert set(data) == set(vars(REPORT)) - {"training"}  # there was none
    assert Report.from_dict(data) == REPORT
    assert Report.from_dict(json.loads(json.dumps(data, allow_nan=False))) == REPORT


def test_a_report_of_a_training_comes_back_and_tells_of_it():
    training = TrainingReport(20, (0.5, 0.3), (0.125, 0.25))
    report = dataclasses.replace(REPORT, training=training)
    assert Report.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    assert (
        "without the private LoRAs: of 100 parts of difference in what the network does, measured by runs"
        " of the checkpoints for random prompts, 18.8 remain in the mean (40.0 before a training of 20 rounds)"
        in format_report(report)
    )
    rows = zip(REPORT.checkpoints, (0.875, 0.75), strict=True)
    rows = tuple(dataclasses.replace(row, explained_weighted=share) for row, share in rows)
    fidelities = (0.7, 0.6)  # before the training
    report = dataclasses.replace(report, checkpoints=rows, shared_fidelity=fidelities)
    text = format_report(report)
    assert (
        "of 100 parts of difference in what the network does, measured by runs of the checkpoints for random prompts,"
        " 18.8 remain in the mean (40.0 before a training of 20 rounds), 25.0 at worst (a_long_checkpoint)"
        in text
    )
    assert "without the private LoRAs" not in text
    short = dataclasses.replace(training, after=(0.125,))
    with pytest.raises(ValueError, match=r"2 rows of 2 figures in report\.training"):
        Report.from_dict(dataclasses.replace(report, training=short).as_dict())


def test_a_first_version_report_loads_without_new_figures():
    data = {k: v for k, v in REPORT.as_dict().items() if k not in ("curve", "similarity", "parts")}
    report = Report.from_dict(data)
    assert (report.curve, report.similarity, report.parts) == ((), (), ())
    assert report.checkpoints == REPORT.checkpoints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "none"}, "expected a finite number in report.loss, got 'none'"),
        ({"loss": float("nan")}, "expected a finite number in report.loss, got nan"),
        ({"loss": True}, "expected a finite number in report.loss, got True"),
        ({"name": 3}, "expected text in report.name, got 3"),
        ({"bytes_loras": 0.5}, "expected a whole number in report.bytes_loras, got 0.5"),
        ({"losses": "0.5"}, "expected a list in report.losses, got '0.5'"),
        ({"losses": [0.5, None]}, "expected a finite number in report.losses[1], got None"),
        ({"not_carried": [1]}, "expected named figures in report.not_carried, got [1]"),
        ({"checkpoints": [4, 5]}, "expected named figures in report.checkpoints[0], got 4"),
        ({"parts": [{"name": "MID"}]}, "report.parts[0] lacks which, energy, lost"),
        ({"loras": ["a"]}, "expected 2 rows of 1 figures in report.multipliers"),
        ({"curve": [[0, 0]]}, "expected 3 rows of 2 figures in report.curve"),
        ({"similarity": [[1, 0], [0]]}, "expected 2 rows of 2 figures in report.similarity"),
    ],
)
def test_a_malformed_report_is_refused_with_the_place(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Report.from_dict(REPORT.as_dict() | change)


def test_an_incomplete_or_foreign_report_is_refused():
    data = REPORT.as_dict()
    del data["loss"], data["bound"]
    with pytest.raises(ValueError, match="report lacks loss, bound"):
        Report.from_dict(data)
    with pytest.raises(ValueError, match="expected named figures in report, got \\[\\]"):
        Report.from_dict([])


def test_shares_of_chosen_layers_and_of_nothing():
    errors = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).double()
    energies = torch.tensor([[4.0, 0.0], [6.0, 0.0]]).double()
    nothing, ones = torch.zeros(2, 2), torch.ones(2)
    weights = torch.tensor([[2.0], [1.0]]).double()
    multipliers = {"unet": torch.zeros(2, 1).double()}
    weighted = (weights * errors, weights * energies)
    fit = Evaluation(multipliers, errors, energies, *weighted, nothing, ones)
    assert fit.loss == pytest.approx(0.4)
    assert fit.explained().tolist() == pytest.approx([0.6, 1.0])
    assert fit.explained(torch.tensor([True, False])).tolist() == pytest.approx([0.75, 1.0])
    assert fit.fidelity.tolist() == pytest.approx([1 - (2 * 1 + 3) / (2 * 4 + 6), 1.0])
    empty = Evaluation(multipliers, *([0 * errors] * 4), nothing, ones)
    assert empty.loss == empty.weighted_loss == 0


def test_the_baselines_stand_in_their_order(merged):
    report = merged.report
    assert (report.private_loss, report.bound) == (None, None)
    assert 0 < report.weighted_bound <= report.weighted_loss < 1
    assert report.weighted_bound <= report.weighted_private_loss < 1
    assert report.losses == tuple(sorted(report.losses, reverse=True))
    assert sum(report.not_carried.values()) < 1
    text = format_report(report)
    assert text.count("  lower bound") == text.count("  private LoRAs") == 1
    assert f"{report.weighted_loss / report.weighted_bound:.2f} times the bound" in text


def test_where_all_counts_alike_the_limits_are_those_of_the_loss(files, tmp_path):
    report = merge(files, tmp_path, layer_weights="plain").report
    assert 0 < report.bound <= report.loss < 1
    assert report.bound < report.private_loss < 1
    assert (report.private_loss, report.bound) == (
        report.weighted_private_loss,
        report.weighted_bound,
    )
    text = format_report(report)
    assert "weighted loss" not in text
    assert f"lower bound                       {report.bound:.4f}" in text
    settings = {"layer_weights": "plain", "fit_weights": (4, 2, 1)}
    weighted = merge(files, tmp_path, name="weighted", **settings).report
    assert (weighted.private_loss, weighted.bound) == (None, None)


def test_full_ranks_explain_everything_but_the_rounding(files, tmp_path):
    largest = max(min(layer.m, layer.n) for layer in layers_of(files[0]))
    report = merge(files, tmp_path, ranks=(largest, largest), dtype="float32", iterations=8).report
    assert report.loss < 1e-5
    assert report.weighted_bound < 1e-5
    assert all(row.explained > 1 - 1e-5 for row in report.checkpoints)


def test_two_checkpoints_get_opposite_multipliers_and_the_best_blocks(files, tmp_path):
    settings = {"ranks": (5,), "iterations": 40, "tolerance": 0, "layer_weights": "plain"}
    report = merge(files[:2], tmp_path, **settings).report
    first, second = (row.multipliers for row in report.checkpoints)
    assert first[0] == pytest.approx(-second[0], abs=1e-3)
    assert report.loss == pytest.approx(report.bound, rel=2e-3)  # the truncated SVD of one matrix


def test_text_and_figures_have_the_share_by_which_all_is_judged(merged):
    report = merged.report
    shares = [row.fidelity for row in report.checkpoints]
    assert shares == list(report.shared_fidelity) != [row.explained for row in report.checkpoints]
    text = format_report(report)
    mean, worst = (100 * (1 - share) for share in (sum(shares) / 3, min(shares)))
    assert f"{mean:.1f} remain in the mean, {worst:.1f} at worst ({report.worst.name})" in text
    assert "in what the network does, estimated from its layout" in text
    assert f"private LoRAs of the same bytes   {report.weighted_private_loss:.4f}" in text
    lost = dataclasses.replace(report, shared_fidelity=(0.1, 0.2, 0.3), curve=((0, 0, 0),) * 3)
    rows = lost.without_topups((), requested=True).checkpoints
    assert [row.fidelity for row in rows] == [0.1, 0.2, 0.3]
