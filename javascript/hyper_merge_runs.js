// The table of runs: a row is picked by mouse or keyboard, and the table can be searched.
"use strict";

window.hyperMergeRuns = (() => {
    const {find, press, put} = window.hyperMerge;
    const rows = () => [...document.querySelectorAll("#hyper_merge_runs_table [data-run]")];
    const field = (name) => find(`#hyper_merge_${name} input, #hyper_merge_${name} textarea`);

    function pick(row) {
        put(field("run"), row.dataset.run);
        show();
    }

    // Rows with all words of the search, in any order; the picked one is marked.
    function show() {
        if (!field("run") || !field("runs_search")) {
            return;
        }
        const words = field("runs_search").value.toLowerCase().split(/\s+/);
        rows().forEach((row) => {
            const text = `${row.textContent} ${row.dataset.words}`.toLowerCase();
            row.hidden = !words.every((word) => text.includes(word));
            const isPicked = row.dataset.run === field("run").value;
            row.classList.toggle("hm-picked", isPicked);
            row.querySelector("button").setAttribute("aria-pressed", isPicked);
        });
        const note = find("#hyper_merge_runs_table .hm-hint");
        if (note) {
            note.hidden = rows().some((row) => !row.hidden);
        }
    }

    function move(row, step) {
        const visible = rows().filter((x) => !x.hidden);
        const next = visible[visible.indexOf(row) + step];
        if (next) {
            next.querySelector("button").focus();
        }
    }

    const rowOf = (event) => event.target.closest("#hyper_merge_runs_table [data-run]");
    document.addEventListener("click", (event) => {
        if (rowOf(event)) {
            pick(rowOf(event));
        }
    });
    document.addEventListener("dblclick", (event) => {
        if (rowOf(event)) {
            press("#hyper_merge_run_open");
        }
    });
    document.addEventListener("keydown", (event) => {
        const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
        if (step && rowOf(event)) {
            event.preventDefault();
            move(rowOf(event), step);
        }
    });
    document.addEventListener("input", (event) => {
        if (event.target.closest("#hyper_merge_runs_search")) {
            show();
        }
    });
    document.addEventListener("hyper-merge-changed", show);

    // Another page may have made or deleted runs while this one, or our tab of the WebUI, was not looked at.
    function renew() {
        const table = find("#hyper_merge_runs_table");
        if (table && table.offsetParent) {
            press("#hyper_merge_runs_refresh");
        }
    }
    window.addEventListener("focus", renew);
    document.addEventListener("click", (event) => {
        if (event.target.closest("#tabs > .tab-nav button")) {
            setTimeout(renew); // once the tab is shown
        }
    }, true); // before gradio 4 draws the button anew

    // Whether the picked run was made of LoRAs, and not of checkpoints.
    const isOfLoras = () => rows().some((row) => row.dataset.run === field("run").value && row.dataset.kind === "loras");

    return {isOfLoras};
})();
