"""What a person reads on the tab: every field is explained, in plain words."""

import re
from html.parser import HTMLParser

import gradio as gr
import pytest
from fake_webui import installed

from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.ui.form_fields import ADVANCED, FORM_FIELDS
from hyper_merge.ui.tab import build_tab

JARGON = re.compile(
    r"sweep|\bbounds?\b|ridge|deviation|gauge|residual|gram\b|cosine", re.IGNORECASE
)
FIELDS = (gr.Textbox, gr.Dropdown, gr.Radio, gr.Number)


@pytest.fixture(params=["app", "webui"])
def blocks(root, request):
    """All that is on the page."""
    if request.param == "app":
        yield list(build_tab(Standalone(root), Jobs()).blocks.values())
    else:
        with installed(root, "a1111") as webui:
            yield list(build_tab(webui.host(), Jobs()).blocks.values())


def is_field(block):
    """Tells whether a block is a labelled field that can be seen, and not a box of prompt tags or a menu
    behind the button that names it."""
    by_script = block.elem_id in (
        "hyper_merge_run",
        "hyper_merge_checkpoints",
        "hyper_merge_lora_picked",
    )
    return isinstance(block, FIELDS) and block.visible and block.container and not by_script


def test_every_field_is_explained(blocks):
    unexplained = [block.label for block in blocks if is_field(block) and not block.info]
    assert unexplained == []


class _Words(HTMLParser):
    def __init__(self):
        super().__init__()
        self.text = []

    def handle_data(self, data):
        self.text.append(data)


def words(block):
    """Returns all that a block shows."""
    if isinstance(block, gr.HTML):
        reader = _Words()
        reader.feed(block.value or "")
        return reader.text
    choices = [str(choice) for choice in getattr(block, "choices", None) or []]
    return [str(getattr(block, name, None) or "") for name in ("label", "info", "value")] + choices


def test_no_word_needs_mathematics(blocks):
    jargon = [text for block in blocks for text in words(block) if JARGON.search(text)]
    assert jargon == []


def test_every_advanced_field_is_in_one_group_and_rare_ones_come_last():
    grouped = [name for rows in ADVANCED.values() for row in rows for name in row]
    plain = {"checkpoints", "name", "ranks"}
    assert sorted(grouped) == sorted({field.name for field in FORM_FIELDS} - plain)
    assert list(ADVANCED)[-1] == "Rarely needed"
    assert {"iterations", "tolerance", "seed"} <= {
        x for row in ADVANCED["Rarely needed"] for x in row
    }
