"""Tags that are sent to txt2img: what the user wrote and picked there stays, our earlier tags go."""

import json

import pytest
from at_the_tab import kinds, words
from fake_webui.styles import PromptStyle

from hyper_merge.operations.export import ExportRequest, run_export
from hyper_merge.operations.extract.extract import ExtractRequest, run_extract
from hyper_merge.runs.run import load_run
from hyper_merge.runtime.progress import Progress
from hyper_merge.ui.handlers.result import prompts_of, save_run_styles
from hyper_merge.ui.handlers.send import send_fit_tags, send_tags

TAGS = "<lora:mix_0-4:0.25000> <lora:mix_1-2:0.75000>"


def send(host, prompt, styles=(), tags=TAGS, title="mix.safetensors"):
    """Returns prompt and removed styles as the script gets them, and the note."""
    before = json.dumps({"prompt": prompt, "styles": list(styles)})
    sent, note = send_tags(host, tags, "mix", title, before)
    after = json.loads(sent)
    return after["prompt"], after["styles"], note


@pytest.fixture
def webui_host(webui, run):
    """A WebUI with the styles of a run."""
    host = webui.host()
    save_run_styles(host, run)
    return host


def test_the_users_prompt_stays(webui_host):
    prompt, styles, note = send(webui_host, "a cat in a garden, painting <lora:ink:0.8>")
    assert prompt == f"a cat in a garden, painting <lora:ink:0.8> {TAGS}"
    assert styles == []
    assert (kinds(note), words(note)) == (["good"], "Added 2 tags to the prompt of txt2img.")


def test_tags_alone_fill_an_empty_prompt(webui_host):
    assert send(webui_host, "")[0] == TAGS


def test_earlier_tags_of_merges_go(webui_host):
    earlier = "a cat <lora:mix_0-4:1>, <lora:mix_1-2:-0.5:1> by the sea"
    prompt, _, note = send(webui_host, earlier)
    assert prompt == f"a cat, by the sea {TAGS}"
    assert "Took out 2 earlier tags." in words(note)


def test_a_hyper_model_alone_needs_no_tags(webui_host):
    prompt, _, note = send(webui_host, f"a cat {TAGS}", tags="")
    assert prompt == "a cat"
    assert "the hyper-model alone" in words(note)


def test_an_exported_lora_goes_and_an_extracted_one_stays(webui_host, run, checkpoints):
    folders = webui_host.folders()
    (exported,) = run_export(ExportRequest(run, ("b",)), folders, Progress())
    extracted = run_extract(
        ExtractRequest(checkpoints / "a.safetensors", checkpoints / "b.safetensors", rank=2),
        folders,
        Progress(),
    )
    alone, other = f"<lora:{exported.path.stem}:1>", f"<lora:{extracted.path.stem}:1>"
    assert send(webui_host, f"a cat {alone} {other}")[0] == f"a cat {other} {TAGS}"


def test_a_picked_style_with_the_same_loras_goes(webui, webui_host, run):
    mine = PromptStyle("mine", f"castle {TAGS}", "")
    ink = PromptStyle("ink", "{prompt} <lora:ink:1>", "")
    webui.prompt_styles.styles.update(mine=mine, ink=ink)
    _, styles, note = send(webui_host, "a cat", ["ink", "mix: b", "gone", "mine"])
    assert styles == ["mix: b", "mine"]
    assert "Took out the style mix: b, mine" in words(note)
    tags = prompts_of(load_run(webui_host.folders(), run))["a"]
    prompt = send(webui_host, "a cat", ["mix: b"], tags)[0]
    drawn = webui.prompt_styles.apply_styles_to_prompt(prompt, ["ink"])
    assert [drawn.count(name) for name in ("<lora:mix_0-4:", "<lora:mix_1-2:")] == [1, 1]


def test_a_name_with_folders_is_no_lora_of_ours(webui_host, root):
    text = "<lora:../Stable-diffusion/mix:1>"
    assert send(webui_host, text)[0] == f"{text} {TAGS}"


def test_an_ambiguous_hyper_model_is_left_to_the_user(webui_host):
    note = send(webui_host, "a cat", title="")[2]
    assert kinds(note) == ["good", "info"]
    assert "Please select the hyper-model of mix in the checkpoint menu" in words(note)


def test_the_tags_of_a_fit_name_its_run(webui_host):
    before = json.dumps({"prompt": "a cat", "styles": []})
    sent, note = send_fit_tags(webui_host, TAGS, '["mix", "d"]', "", before)
    assert json.loads(sent)["prompt"] == f"a cat {TAGS}"
    assert "the hyper-model of mix" in words(note)


def test_tags_of_a_run_that_is_gone_are_not_sent(webui_host, run):
    before = json.dumps({"prompt": "a cat", "styles": []})
    sent, note = send_tags(webui_host, TAGS, "gone", "", before)
    assert (sent, kinds(note)) == ("", ["bad"])
    assert "there is no run gone" in words(note)


def test_a_page_without_the_prompt_is_told_so(webui_host):
    sent, note = send_tags(webui_host, TAGS, "mix", "", "")
    assert (sent, kinds(note)) == ("", ["bad"])
