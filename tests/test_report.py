"""The report's figures are those of dense arithmetic, and its table is laid out for people."""

import json

import pytest
import torch
from tiny_family import layers_of, merge

from hyper_merge.report import CheckpointReport, Fit, Report, text

REPORT = Report(
    name="mix",
    loras=("mix_0-8", "mix_1-4"),
    checkpoints=(
        CheckpointReport("anime", 0.8125, 0.8, 0.9125, 0.4330, 0.0123, (1.0, -0.5)),
        CheckpointReport("a_long_checkpoint", 1.0, 1.0, 1.0, 0.0, 0.0, (0.25, 1.0)),
    ),
    method="joint",
    losses=(0.5, 0.25, 0.12345),
    loss=0.125,
    private_loss=0.25,
    bound=0.1,
    not_carried={"norms": 0.005, "VAE": 0.0},
    bytes_before=4_264_000_000,
    bytes_average=2_132_000_000,
    bytes_loras=53_400_000,
)

TABLE = """\
mix: 2 checkpoints, 2 shared LoRAs

checkpoint         explained    UNet  text enc.  rel. error   not carried
anime                 81.25%  80.00%    91.25%      0.4330        1.230%
a_long_checkpoint    100.00% 100.00%   100.00%      0.0000        0.000%

loss: what stays unexplained, as a share of all differences in the layers
  average alone                     1.0000
  private LoRAs of the same bytes   0.2500
  shared LoRAs, as written          0.1250   1.25 times the bound
  lower bound for these ranks       0.1000
  by sweeps, before rounding: 0.5000 0.2500 0.1235

not carried by LoRAs, as a share of all differences: norms 0.500%, VAE 0.000%

4.26 GB of checkpoints -> hyper-model 2.13 GB + LoRAs 0.053 GB = 2.19 GB
"""


def test_the_table_is_laid_out_for_people():
    assert text(REPORT) == TABLE


def test_the_greedy_method_counts_blocks_not_sweeps():
    greedy = Report(**dict(vars(REPORT), method="greedy", losses=(0.5,)))
    assert "\n  by blocks, before rounding: 0.5000\n" in text(greedy)


def test_the_manifest_has_every_figure():
    found = json.loads(json.dumps(REPORT.as_dict(), allow_nan=False))
    assert set(found) == set(vars(REPORT))
    rows = [
        CheckpointReport(**dict(r, multipliers=tuple(r["multipliers"])))
        for r in found["checkpoints"]
    ]
    found |= {
        "checkpoints": tuple(rows),
        "loras": tuple(found["loras"]),
        "losses": tuple(found["losses"]),
    }
    assert Report(**found) == REPORT


def test_shares_of_chosen_layers_and_of_nothing():
    errors = torch.tensor([[1.0, 0.0], [3.0, 0.0]]).double()
    energies = torch.tensor([[4.0, 0.0], [6.0, 0.0]]).double()
    fit = Fit(torch.zeros(2, 1).double(), errors, energies)
    assert fit.loss == pytest.approx(0.4)
    assert fit.explained().tolist() == pytest.approx([0.6, 1.0])
    assert fit.explained(torch.tensor([True, False])).tolist() == pytest.approx([0.75, 1.0])
    assert Fit(torch.zeros(2, 1), 0 * errors, 0 * energies).loss == 0


def test_the_baselines_stand_in_their_order(merged):
    report = merged.report
    assert 0 < report.bound <= report.loss < 1
    assert report.bound <= report.private_loss < 1
    assert report.losses == tuple(sorted(report.losses, reverse=True))
    assert sum(report.not_carried.values()) < 1


def test_full_ranks_explain_everything_but_the_rounding(files, tmp_path):
    largest = max(min(layer.m, layer.n) for layer in layers_of(files[0]))
    report = merge(files, tmp_path, ranks=(largest, largest), dtype="float32", iterations=8).report
    assert report.loss < 1e-5
    assert report.bound < 1e-5
    assert all(row.explained > 1 - 1e-5 for row in report.checkpoints)


def test_two_checkpoints_get_opposite_multipliers_and_the_best_blocks(files, tmp_path):
    report = merge(files[:2], tmp_path, ranks=(5,), iterations=40, tolerance=0).report
    first, second = (row.multipliers for row in report.checkpoints)
    assert first[0] == pytest.approx(-second[0], abs=1e-3)
    assert report.loss == pytest.approx(report.bound, rel=1e-3)  # the truncated SVD of one matrix
