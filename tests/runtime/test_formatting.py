"""Sizes, durations and counts as text, in the same form everywhere."""

import pytest

from hyper_merge.runs.folders import SIZE_LIMIT
from hyper_merge.runtime.formatting import format_count, format_duration, format_size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 kB"),
        (12_000, "12 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (584_020_720, "584 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.00 GB"),
        (2_132_471_230, "2.13 GB"),
        (SIZE_LIMIT, "20.00 GB"),
    ],
)
def test_a_size_is_in_decimal_units(count, text):
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "a few seconds"),
        (12, "about 10 seconds"),
        (86, "about 90 seconds"),
        (91, "about 2 minutes"),
        (268, "about 4 minutes"),
        (3 * 3600 + 900, "about 3.2 hours"),
        (7 * 3600, "about 7 hours"),
    ],
)
def test_a_duration_is_put_as_a_person_would(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 rounds"), (1, "1 round"), (2, "2 rounds"), (20, "20 rounds")]
)
def test_a_noun_is_in_the_plural_unless_there_is_one(count, text):
    assert format_count(count, "round") == text
