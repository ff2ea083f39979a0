"""What a browser sends to the tab's handlers, and what people read in their answers."""

import threading
import time
from dataclasses import replace
from html.parser import HTMLParser

from hyper_merge.ui.form import Form
from hyper_merge.ui.form_fields import BASE_AVERAGE
from hyper_merge.ui.handlers.merge import watch_job

NAMES = ["a.safetensors", "b.safetensors", "c.safetensors"]
EVIL = "<img src=x>"
FORM = Form(
    checkpoints=NAMES,
    name="mix",
    ranks="4, 2",
    weights="",
    block_weights="",
    base=BASE_AVERAGE,
    dtype="float16",
    lora_dtype="same",
    device="cpu",
    iterations=3,
    tolerance=2e-3,
    seed=0,
    memory="",
    vae="from the first checkpoint",
    exact="none",
    topup="",
    allocation="adaptive: where they help most",
    separate=True,
    fit_weights="",
    layer_weights="by their effect on the picture",
    training="0",
    damaged="refuse them",
    save_styles=True,
)
"""That of the merge which the fixture `run` has made."""


def values(**changes):
    """Returns the form's values with changes, in the order of its widgets."""
    return list(replace(FORM, **changes).widget_values())


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.kinds, self.tags, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        classes = (dict(attributes).get("class") or "").split()
        if "hm-message" in classes:
            self.kinds += [name[3:] for name in classes if name != "hm-message"]

    def handle_data(self, data):
        self.words.append(data)


def _read(html):
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return reader


def kinds(html):
    """Returns the kinds of the messages in it: info, good or bad."""
    return _read(html).kinds


def words(html):
    """Returns the text that a person reads."""
    return "".join(_read(html).words)


def tags(html):
    """Returns all elements in it."""
    return set(_read(html).tags)


def unchanged(update):
    """Tells whether a handler leaves a widget as it is."""
    return isinstance(update, dict) and update.keys() <= {"__type__"}


def ended(jobs):
    """Returns how the last job ended, once it has."""
    deadline = time.monotonic() + 60
    while jobs.last.status.outcome == "running":
        assert time.monotonic() < deadline, jobs.last.status
        jobs.last.wait(0.1)
    return jobs.last.status


def until(condition):
    """Returns once a condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def no_thread():
    """Tells whether all jobs have gone, also those that ended before their work did."""
    return not any(thread.name == "hyper-merge" for thread in threading.enumerate())


def last_words(jobs):
    """Returns the message that the page shows once the job has ended."""
    status, button, _ = list(watch_job(jobs))[-1]
    assert button["interactive"] is False
    return status
