"""The WebUI's page as a browser gets it: txt2img, the extension's tab, Settings, and its scripts.

The browser code is our own, of the same names as the hosts': gradioApp, onUiLoaded, randomId,
requestProgress, switch_to_txt2img, selectCheckpoint.
"""

import re
from pathlib import Path

import pytest
from fastapi import Body
from local_server import skip_self_check

from .api import create_api
from .options import apply

OPTIONS_DELAY = 3000  # milliseconds until a page has the settings that its scripts depend on
ELSEWHERE = re.compile(
    rb"""<link[^>]*["']https://[^>]*>|<script[^>]*["']https://[^>]*>\s*</script>"""
)
HOST_SCRIPT = """
function gradioApp() {
    const app = document.getElementsByTagName('gradio-app')[0];
    if (!app) return document;
    app.getElementById = (id) => document.getElementById(id);
    return app.shadowRoot || app;
}
function onUiLoaded(callback) {
    const timer = setInterval(() => {
        if (!gradioApp().querySelector('#txt2img_prompt')) return;
        clearInterval(timer);
        callback();
    }, 50);
}
function randomId() {
    const part = () => Math.random().toString(36).slice(2, 9);
    return 'task(' + part() + part() + ')';
}
let opts = {};
onUiLoaded(() => setTimeout(() => { opts = {show_progressbar: true}; }, OPTIONS_DELAY));
function requestProgress(id, container, gallery, atEnd, onProgress) {
    const bar = document.createElement('div');
    bar.className = 'progressDiv';
    bar.style.display = opts.show_progressbar ? 'block' : 'none';
    container.parentNode.insertBefore(bar, container);
    const timer = setInterval(async() => {
        const answer = await fetch('./internal/progress', {
            method: 'POST',
            headers: {'Content-Type': 'application/json'},
            body: JSON.stringify({id_task: id}),
        });
        const state = await answer.json();
        if (onProgress) onProgress(state);
        if (state.completed) {
            clearInterval(timer);
            bar.remove();
            if (atEnd) atEnd();
        }
    }, 200);
}
function switch_to_txt2img() {
    gradioApp().querySelector('#tabs').querySelectorAll('button')[0].click();
    return Array.from(arguments);
}
var desiredCheckpointName = null;
function selectCheckpoint(name) {
    desiredCheckpointName = name;
    gradioApp().getElementById('change_checkpoint').click();
}
"""


def create_ui(webui):
    """Everything on one page, in the hosts' order: settings, then tabs."""
    import gradio as gr

    webui.script_callbacks.before_ui_callback()  # called by `webui.py` just before
    js = "_js" if gr.__version__.startswith("3.") else "js"
    webui.script_callbacks.ui_settings_callback()
    txt2img = _txt2img(gr, webui)
    settings, components = _settings(gr, webui)
    interfaces = [(txt2img, "Txt2img" if webui.flavour == "forge" else "txt2img", "txt2img")]
    interfaces += webui.script_callbacks.ui_tabs_callback()
    interfaces += [(settings, "Settings", "settings")]
    theme = gr.themes.Default(font=["sans-serif"], font_mono=["monospace"])  # none from elsewhere
    with gr.Blocks(analytics_enabled=False, title="Stable Diffusion", theme=theme) as demo:
        _quicksettings(gr, webui, demo, js)
        with gr.Tabs(elem_id="tabs"):
            for blocks, label, name in interfaces:
                with gr.TabItem(label, id=name, elem_id=f"tab_{name}"):
                    blocks.render()
        demo.load(
            lambda: [gr.update(value=getattr(webui.opts, key)) for key in components],
            inputs=[],
            outputs=list(components.values()),
            queue=False,
        )
    return demo


def _txt2img(gr, webui):
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Textbox(label="Prompt", elem_id="txt2img_prompt", lines=3)
        gr.Textbox(label="Negative prompt", elem_id="txt2img_neg_prompt", lines=3)
        styles = gr.Dropdown(
            label="Styles",
            elem_id="txt2img_styles",
            choices=list(webui.prompt_styles.styles),
            value=[],
            multiselect=True,
            interactive=True,
        )
        refresh = gr.Button("Refresh styles", elem_id="refresh_txt2img_styles")
        interrupt = gr.Button("Interrupt", elem_id="txt2img_interrupt")
        skip = gr.Button("Skip", elem_id="txt2img_skip")
    with blocks:
        refresh.click(
            lambda: gr.update(choices=list(webui.prompt_styles.styles)), inputs=[], outputs=[styles]
        )
        interrupt.click(webui.state.interrupt, inputs=[], outputs=[])
        skip.click(webui.state.skip, inputs=[], outputs=[])
    return blocks


def _settings(gr, webui):
    """The page of settings and its components by key."""
    components = {}
    with gr.Blocks(analytics_enabled=False) as blocks:
        submit = gr.Button("Apply settings", elem_id="settings_submit")
        result = gr.HTML(elem_id="settings_result")
        for section in dict.fromkeys(info.section for info in webui.opts.data_labels.values()):
            with gr.Column(elem_id=f"column_settings_{section[0]}"):
                for key, info in webui.opts.data_labels.items():
                    if info.section == section:
                        components[key] = _setting(gr, webui.opts, key)
        submit.click(
            lambda *values: apply(webui.opts, values, webui.config_filename),
            inputs=list(components.values()),
            outputs=[result],
        )
    return blocks, components


def _setting(gr, opts, key):
    info = opts.data_labels[key]
    args = info.component_args() if callable(info.component_args) else info.component_args
    by_type = {str: gr.Textbox, int: gr.Number, bool: gr.Checkbox}
    component = info.component or by_type[type(info.default)]
    value = lambda: opts.data.get(key, info.default)  # noqa: E731 - read at every page load
    return component(label=info.label, value=value(), elem_id=f"setting_{key}", **(args or {}))


def _quicksettings(gr, webui, demo, js):
    """The checkpoint dropdown, filled again by its button and, in Forge, with each page."""
    tiles = webui.sd_models.checkpoint_tiles
    forge = webui.lazy
    with gr.Row(elem_id="quicksettings"):
        dropdown = gr.Dropdown(
            label="Checkpoint",
            choices=tiles(),
            value=lambda: webui.opts.data.get("sd_model_checkpoint"),
            elem_id="setting_sd_model_checkpoint",
        )
        name = "forge_refresh_checkpoint" if forge else "refresh_sd_model_checkpoint"
        refresh = gr.Button("Refresh", elem_id=name)
        change = gr.Button("Change checkpoint", elem_id="change_checkpoint", visible=False)

    def refreshed():
        webui.sd_models.list_models()
        return gr.update(choices=tiles())

    def chosen(name):
        webui.opts.data["sd_model_checkpoint"] = name
        return gr.update(value=name, choices=tiles())

    refresh.click(refreshed, inputs=[], outputs=[dropdown])
    chosen_name = "(shown) => { const name = desiredCheckpointName; desiredCheckpointName = null; "
    change.click(
        chosen,
        inputs=[dropdown],
        outputs=[dropdown],
        **{js: chosen_name + "return name || shown; }"},
    )
    if forge:
        demo.load(refreshed, inputs=[], outputs=[dropdown], queue=False)


def launch(webui, port, **options):
    """Starts the server in the background and returns the address of the page."""
    demo = create_ui(webui)
    webui.shared.demo = demo
    demo.queue(64)
    with_head(head(Path(__file__).parents[2]))
    with pytest.MonkeyPatch.context() as patch:
        skip_self_check(patch)
        app, address, _ = demo.launch(
            server_name="127.0.0.1",
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            show_api=False,
            **options,
        )
    app.add_api_route("/internal/progress", progress_route(webui), methods=["POST"])
    if webui.cmd_opts.api:
        create_api(webui, app)
    webui.script_callbacks.app_started_callback(demo, app)
    return address


def close(webui):
    """Ends what `launch` began."""
    import gradio as gr

    webui.shared.demo.close(verbose=False)
    vars(gr.routes.templates).pop("TemplateResponse", None)


def progress_route(webui):
    """POST /internal/progress."""

    def route(request: dict = Body()):  # noqa: B008 - how FastAPI is told
        return webui.progress.answer(request.get("id_task"))

    return route


def head(extension):
    """Returns the head of the hosts' page: their scripts, then the extension's and its style."""
    scripts = [HOST_SCRIPT.replace("OPTIONS_DELAY", str(OPTIONS_DELAY))]
    scripts += [
        path.read_text(encoding="utf-8") for path in sorted((extension / "javascript").glob("*.js"))
    ]
    style = extension / "style.css"
    css = style.read_text(encoding="utf-8") if style.exists() else ""
    css += "div.gradio-container { overflow: visible !important; }"  # as in the hosts' own style
    tags = "".join(f"<script>\n{script}\n</script>\n" for script in scripts)
    return f"<style>\n{css}\n</style>\n{tags}"


def with_head(text):
    """Has gradio put `text` into the head of its pages, and leave out what is elsewhere.

    Tests have no network: every such script or font would be an error in the browser's console.
    """
    import gradio as gr

    templates = gr.routes.templates
    original = type(templates).TemplateResponse.__get__(templates)

    def response(*args, **kwargs):
        page = original(*args, **kwargs)
        body = ELSEWHERE.sub(b"", page.body)
        page.body = body.replace(b"</head>", f"{text}</head>".encode())
        page.init_headers()
        return page

    templates.TemplateResponse = response
