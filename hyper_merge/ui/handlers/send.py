"""Handles the buttons that send prompt tags to the host's txt2img.

Handlers take and return plain values or `gr.update(...)`, no widgets. The first arguments come from the
wiring (the host), the rest from the browser.
"""

from __future__ import annotations

import json

from hyper_merge.errors import HyperMergeError
from hyper_merge.hosts.host import Host
from hyper_merge.loras.prompt_tags import tag_names, without_loras
from hyper_merge.runs.own_loras import merged_loras_in
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.checked_json import parse_json
from hyper_merge.runtime.formatting import format_count
from hyper_merge.ui.html.common import format_message


def send_tags(host: Host, tags: str, run: str, title: str, txt2img: str) -> tuple[str, str]:
    """Adds tags to the prompt of txt2img, in place of the tags and styles of our merges.

    A LoRA that a tag and a style name, or two tags, would count twice.

    Args:
        host: the program around the tab.
        tags: to be added; none for the hyper-model alone.
        run: name of the tags' run.
        title: title by which the host selects the run's hyper-model; empty if it cannot.
        txt2img: prompt and picked styles of txt2img as they are, as JSON; empty where the page has
            no such prompt.

    Returns:
        The new prompt and the styles to take out, as JSON for the script, and a note.
    """
    if not txt2img:
        return "", format_message("bad", "This page has no prompt of txt2img; copy the tags.")
    try:
        load_run(host.folders(), run)
    except HyperMergeError as error:  # another page may have deleted it
        return "", format_message("bad", str(error))
    before = parse_json(txt2img)
    prompt, picked = str(before["prompt"]), [str(name) for name in before["styles"]]
    known, folder = host.styles(), host.folders().loras
    everything = " ".join([prompt, *(known.get(name, "") for name in picked)])
    ours = tag_names(tags) | merged_loras_in(everything, folder)
    styles = [name for name in picked if ours & tag_names(known.get(name, ""))]
    rest = without_loras(prompt, ours)
    after = {"prompt": f"{rest} {tags}".strip(), "styles": styles}
    return json.dumps(after), _format_sent(tags, len(ours & tag_names(prompt)), styles) + (
        "" if title else _format_request(run)
    )


def send_fit_tags(host: Host, tags: str, fitted: str, title: str, txt2img: str) -> tuple[str, str]:
    """Sends the tags of a fit, whose run and name are JSON."""
    run = str(parse_json(fitted or '["", ""]')[0])
    return send_tags(host, tags, run, title, txt2img)


def _format_sent(tags: str, removed: int, styles: list[str]) -> str:
    added = format_count(len(tag_names(tags)), "tag")
    text = f"Added {added} to the prompt of txt2img." if tags else "Sent the hyper-model alone."
    if removed:
        text += f" Took out {format_count(removed, 'earlier tag')}."
    if styles:
        text += f" Took out the style {', '.join(styles)}, whose LoRAs would count in addition."
    return format_message("good", text)


def _format_request(run: str) -> str:
    return format_message(
        "info",
        f"Please select the hyper-model of {run} in the checkpoint menu: its name is not unique.",
    )
