"""The words for plots say what the plots show."""

from dataclasses import replace

from sample_report import REPORT

from hyper_merge.runs.report import CheckpointReport, PartLoss
from hyper_merge.ui.plots.description import (
    describe_explained,
    describe_parts,
    describe_similarity,
)


def report(names, shares=(), similarity=(), parts=()):
    rows = tuple(CheckpointReport(name, 0.9, 0.9, 0.9, 0.3, 0.0, (1.0,)) for name in names)
    curve = ((0.0,) * len(names), tuple(shares)) if shares else ()
    return replace(REPORT, checkpoints=rows, curve=curve, similarity=similarity, parts=parts)


def test_a_few_checkpoints_are_all_named_from_the_best_on():
    text = describe_explained(report(["a", "b"], (0.5, 0.75)))
    assert text.endswith("Explained in weights by all 1: b 75.0 %, a 50.0 %.")


def test_of_many_checkpoints_the_best_and_the_worst_are_named():
    names = [f"m{i}" for i in range(9)]
    text = describe_explained(report(names, [i / 10 for i in range(9)]))
    assert text.endswith("from the best to the worst: m8 80.0 %, m0 0.0 %.")


def test_the_most_and_the_least_similar_pair_are_named():
    similarity = ((1.0, 0.5, -0.25), (0.5, 1.0, 0.1), (-0.25, 0.1, 1.0))
    text = describe_similarity(report("abc", similarity=similarity))
    assert "The most similar: a and b (+0.50); the least: a and c (-0.25)." in text


def test_the_largest_sections_are_named_with_what_is_lost():
    parts = tuple(PartLoss(f"IN{i:02d}", "unet", i / 100, i / 1000) for i in range(8))
    text = describe_parts(report("ab", parts=parts))
    assert "IN07 7.0 %, of it not explained 0.7 %" in text
    assert "IN01" not in text


def test_without_figures_each_says_so():
    empty = report("ab")
    for describe in (describe_explained, describe_similarity, describe_parts):
        assert describe(empty) == "The report has no figures for this plot."
