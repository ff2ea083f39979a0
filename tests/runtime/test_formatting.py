"""Bytes as people read them: in one way everywhere, with decimal units."""

import pytest

from hyper_merge.runs.folders import SIZE_LIMIT
from hyper_merge.runtime.formatting import format_size


@pytest.mark.parametrize(
    ("count", "words"),
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
def test_a_size_is_said_in_decimal_units(count, words):
    assert format_size(count) == words
