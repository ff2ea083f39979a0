import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_merge.decomposition.rank_allocation import even_ranks
from hyper_merge.errors import RankError

shapes = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=5)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), shapes)
def test_even_ranks_are_capped_in_small_layers(ranks, layers):
    capped = even_ranks(ranks, layers)
    assert len(capped) == len(layers)
    for rank, (m, n) in zip(capped, layers, strict=True):
        assert rank == tuple(r if r <= m and r <= n else min(m, n) for r in ranks)


@pytest.mark.parametrize("ranks", [[], [0], [4, -1], (8, 0, 2)])
def test_no_ranks_and_ranks_below_one_are_refused(ranks):
    message = f"ranks must be 1 or more, at least one of them, got {list(ranks)}"
    with pytest.raises(RankError, match=f"^{re.escape(message)}$"):
        even_ranks(ranks, [(4, 4)])
