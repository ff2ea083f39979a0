"""The size of a private LoRA is a rank or a share."""

import pytest

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.parsing import PrivateLoraTarget, parse_private_lora_target


@pytest.mark.parametrize(
    ("words", "target"),
    [
        ("16", PrivateLoraTarget(rank=16)),
        ("95%", PrivateLoraTarget(share=0.95)),
        (" 0.5 %", PrivateLoraTarget(share=0.005)),
        (None, None),
    ],
)
def test_a_top_up_is_a_rank_or_a_share(words, target):
    assert parse_private_lora_target(words) == target


@pytest.mark.parametrize("words", ["0", "-3", "1.5", "100%", "0%", "lots", "95 percent", "nan%"])
def test_other_top_ups_are_refused(words):
    with pytest.raises(RecipeError, match="expected a rank from 1 to 4096, or a share above 0%"):
        parse_private_lora_target(words)
