// Progress and copying; nothing here touches anything outside of the tab.
"use strict";

window.hyperMerge = (() => {
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const find = (selector) => root().querySelector(selector);

    // Clipboard of its own accord only on secure pages; elsewhere a selection is copied.
    function copy(text) {
        if (navigator.clipboard && window.isSecureContext) {
            navigator.clipboard.writeText(text).then(confirm, () => copySelected());
        } else {
            copySelected();
        }
    }

    function copySelected() {
        const box = find("#hyper_merge_prompt textarea");
        box.focus();
        box.select();
        document.execCommand("copy");
        confirm();
    }

    function confirm() {
        const button = find("#hyper_merge_copy");
        const label = button.textContent;
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = label; }, 1200);
    }

    // The WebUI's own way to change the checkpoint; the app has none.
    function select(title) {
        if (title && typeof selectCheckpoint === "function") {
            selectCheckpoint(title);
        }
    }

    function openTab(index) {
        const buttons = root().querySelectorAll("#hyper_merge_tabs > .tab-nav button, #hyper_merge_tabs > div:first-child button[role=tab]");
        if (buttons[index]) {
            buttons[index].click();
        }
    }

    // Where the WebUI draws progress, its bar takes the place of ours.
    let task = null;
    function follow() {
        const element = find("#hyper_merge_status [data-task]");
        if (!element || element.dataset.task === task || typeof requestProgress !== "function") {
            return;
        }
        task = element.dataset.task;
        find("#hyper_merge_tab").classList.add("hm-host-bar");
        requestProgress(task, find("#hyper_merge_status"), null, () => {
            find("#hyper_merge_tab").classList.remove("hm-host-bar");
        });
    }

    function watch() {
        const tab = find("#hyper_merge_tab");
        if (!tab) {
            setTimeout(watch, 500);
            return;
        }
        new MutationObserver(follow).observe(tab, {childList: true, subtree: true});
        follow();
    }
    watch();

    return {copy, select, openTab};
})();
