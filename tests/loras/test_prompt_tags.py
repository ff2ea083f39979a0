"""Multipliers become prompt tags that every host reads, and come back."""

import re

import pytest
import torch
from host_prompts import a1111
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_merge.loras.prompt_tags import Tag, format_tag, format_tags, lora_names, parse_tags

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}_[0-9]-[1-9][0-9]{0,2}", fullmatch=True)
MULTIPLIERS = st.floats(-1e6, 1e6)


def test_loras_are_named_by_place_and_rank():
    assert lora_names("mix", (128, 64, 64)) == ("mix_0-128", "mix_1-64", "mix_2-64")


@pytest.mark.parametrize(
    ("multiplier", "text"),
    [
        (0.9123, "0.91230"),
        (-0.3349996, "-0.33500"),
        (1, "1.00000"),
        (1e-9, "0.00000"),
        (-1e-9, "0.00000"),
        (-0.0, "0.00000"),
        (1.5e-5, "0.00002"),
        (1e17, "100000000000000000.00000"),
        (torch.tensor(0.25), "0.25000"),
    ],
)
def test_a_tag_is_a_plain_decimal_number(multiplier, text):
    assert format_tag("mix_0-128", multiplier) == f"<lora:mix_0-128:{text}>"


def test_the_text_encoders_own_number_stands_first():
    assert format_tag("a", 0.5, -1) == "<lora:a:-1.00000:0.50000>"
    assert parse_tags("<lora:a:-1:.5>") == [Tag("a", multiplier=0.5, text_multiplier=-1.0)]
    assert format_tags(["a", "b"], [1, 2], [3, 4]) == (
        "<lora:a:3.00000:1.00000> <lora:b:4.00000:2.00000>"
    )


@settings(deadline=None)
@given(st.dictionaries(NAMES, st.tuples(MULTIPLIERS, MULTIPLIERS), max_size=5), st.booleans())
def test_tags_come_back_as_they_went(multipliers, separate):
    unet, text = ([pair[i] for pair in multipliers.values()] for i in (0, 1))
    written = (
        format_tags(list(multipliers), unet, text)
        if separate
        else format_tags(list(multipliers), unet)
    )
    prompt = f"a cat, (best:1.2) {written} [a:b:0.5]"
    tags = parse_tags(prompt)
    text = text if separate else unet
    rows = [row for row in zip(multipliers, unet, text, strict=True) if row[1] or row[2]]
    assert [tag.name for tag in tags] == [name for name, _, _ in rows]  # none that adds nothing
    for parsed, (_, multiplier, text_multiplier) in zip(tags, rows, strict=True):
        assert parsed.multiplier == pytest.approx(multiplier, rel=1e-15, abs=5.0001e-6)
        assert parsed.text_multiplier == pytest.approx(text_multiplier, rel=1e-15, abs=5.0001e-6)
    assert a1111(prompt) == tags


@settings(deadline=None)
@given(NAMES, MULTIPLIERS, MULTIPLIERS)
def test_a_tag_that_was_read_is_written_the_same(name, multiplier, text_multiplier):
    twice = format_tag(name, multiplier, text_multiplier)
    assert format_tag(*parse_tags(twice)[0]) == twice
    once = format_tag(name, multiplier)
    read = parse_tags(once)[0]
    assert read.multiplier == read.text_multiplier
    assert format_tag(*read[:2]) == once
    assert "e" not in once.rpartition(":")[2]
    assert ":-0.00000>" not in once


def test_a_tag_without_a_number_counts_once():
    assert parse_tags("<lora:a> and <lora:b: .5 >") == [("a", 1.0, 1.0), ("b", 0.5, 0.5)]


@pytest.mark.parametrize(
    "wrong",
    ["<lora:a:1:0.5:2>", "<lora:a:1:dyn=4>", "<lora:a:much>", "<lora:a:nan>", "<lora:a:>"],
)
def test_an_unreadable_tag_is_refused_as_it_stands(wrong):
    message = re.escape(f"expected <lora:name:multiplier> or <lora:name:te:unet>, got {wrong}")
    with pytest.raises(ValueError, match=message):
        parse_tags(f"a cat {wrong}")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_multiplier_that_is_no_number_is_refused(wrong):
    with pytest.raises(ValueError, match=f"expected a finite multiplier for a, got {wrong}"):
        format_tag("a", wrong)
    with pytest.raises(ValueError, match=f"expected a finite multiplier for a, got {wrong}"):
        format_tag("a", 1.0, wrong)


@pytest.mark.parametrize("wrong", ["a:b", "a>", "<a", "a=b", "", "a\nb"])
def test_a_name_that_would_end_the_tag_is_refused(wrong):
    with pytest.raises(ValueError, match="expected a name without : < > = and line breaks"):
        format_tag(wrong, 1)


def test_each_lora_needs_its_multiplier():
    with pytest.raises(ValueError, match="zip"):
        format_tags(["a", "b"], [1.0])
    with pytest.raises(ValueError, match="zip"):
        format_tags(["a", "b"], [1.0, 2.0], [1.0])
