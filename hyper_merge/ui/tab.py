"""Builds the whole tab: its panels and their events."""

from __future__ import annotations

from typing import Any

import gradio as gr

from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs, process_jobs
from hyper_merge.operations.catalogue import process_catalogue
from hyper_merge.runtime.devices import list_devices
from hyper_merge.ui.element_ids import elem_id
from hyper_merge.ui.handlers.picker import offers_demo
from hyper_merge.ui.panels.compare import build_compare
from hyper_merge.ui.panels.history import build_history
from hyper_merge.ui.panels.loras import build_loras
from hyper_merge.ui.panels.picker import build_picker
from hyper_merge.ui.panels.result import build_result
from hyper_merge.ui.panels.run import build_run
from hyper_merge.ui.panels.settings import build_form
from hyper_merge.ui.panels.use import build_use
from hyper_merge.ui.wiring.common import Wiring
from hyper_merge.ui.wiring.compare import wire_compare
from hyper_merge.ui.wiring.loras import wire_lora_jobs, wire_lora_runs, wire_loras
from hyper_merge.ui.wiring.merge import wire_page, wire_picker, wire_run
from hyper_merge.ui.wiring.presets import wire_presets
from hyper_merge.ui.wiring.runs import wire_deletion, wire_history, wire_next_steps, wire_result
from hyper_merge.ui.wiring.use import wire_use, wire_use_jobs


def build_tab(host: Host, jobs: Jobs | None = None, **settings: Any) -> gr.Blocks:
    """Builds the tab's page.

    Args:
        host: the WebUI, or the folder of the app.
        jobs: the jobs to show and start; by default those of the process.
        settings: arguments of the `gr.Blocks`, for a standalone page.
    """
    with gr.Blocks(analytics_enabled=False, **settings) as page:
        with gr.Column(elem_id=elem_id("tab")):
            wires = _build(host, jobs or process_jobs())
        for wire in (wire_picker, wire_presets, wire_run, wire_result, wire_history, wire_deletion):
            wire(wires)
        for wire in (wire_next_steps, wire_use, wire_use_jobs):
            wire(wires)
        for wire in (wire_loras, wire_lora_jobs, wire_lora_runs):
            wire(wires)
        wire_compare(page, wires)
        wire_page(page, wires)
    return page


def _build(host: Host, jobs: Jobs) -> Wiring:
    """Builds all panels, each in its place on the page."""
    with gr.Tabs(elem_id=elem_id("tabs")):
        with gr.Tab("Merge", elem_id=elem_id("merge_tab")):
            picker = build_picker(host.folders().models, demo=offers_demo(host))
            with gr.Row(elem_id=elem_id("columns")):
                with gr.Column(min_width=380):
                    preset, form, presets, size = build_form(
                        host, picker.checkpoints, list_devices()
                    )
                    run = build_run()
                with gr.Column(min_width=380):
                    result = build_result(host)
        with gr.Tab("Use", elem_id=elem_id("use_tab")) as opened:
            use = build_use(host, opened)
        with gr.Tab("Compare", elem_id=elem_id("compare_tab")) as opened:
            compare = build_compare(host, opened)
        with gr.Tab("LoRAs", elem_id=elem_id("loras_tab")) as opened:
            loras = build_loras(opened)
        with gr.Tab("Runs", elem_id=elem_id("runs_tab")) as opened:
            earlier = build_history(opened)
    return Wiring(
        host,
        jobs,
        process_catalogue(),
        picker,
        form,
        preset,
        presets,
        size,
        run,
        result,
        earlier,
        use,
        compare,
        loras,
    )
