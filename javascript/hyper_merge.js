// Progress, copying, and when to look at the form again. Outside of the tab only the WebUI's own functions and buttons are used.
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

    // The WebUI's own way to change the checkpoint; the app has none. Forge's menu takes only what
    // it was last filled with.
    function select(title) {
        if (title && typeof selectCheckpoint === "function") {
            press("#forge_refresh_checkpoint");
            selectCheckpoint(title);
        }
    }

    // The WebUI's own buttons that read its lists anew: styles, cards, menu of checkpoints.
    const refreshers = {
        styles: ["#refresh_txt2img_styles", "#refresh_img2img_styles"],
        lists: [
            "#txt2img_lora_extra_refresh", "#img2img_lora_extra_refresh",
            "#refresh_sd_model_checkpoint", "#forge_refresh_checkpoint",
        ],
    };
    let refreshed = "";
    function refresh(what, run) {
        if (what === "styles") {
            refreshers.styles.forEach(press);
        } else if (run && run !== refreshed) {
            refreshed = run;
            [...refreshers.styles, ...refreshers.lists].forEach(press);
        }
    }

    function press(selector) {
        const button = find(selector);
        if (button) {
            button.click();
        }
    }

    // After the last of several changes, and never while one is looked at: gradio 3.41 drops those.
    let timer = null, asked = 0, again = false;
    function replan() {
        clearTimeout(timer);
        timer = setTimeout(ask, 150);
    }

    function ask() {
        if (asked && Date.now() - asked < 20000) {
            again = true;
            return;
        }
        asked = Date.now();
        press("#hyper_merge_replan");
    }

    function planned() {
        asked = 0;
        if (again) {
            again = false;
            ask();
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

    return {copy, select, refresh, replan, planned, openTab};
})();
