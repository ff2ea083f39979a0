// Copying, sending, mixing, going to places, and when to update the plan; the other scripts build on it.
// Outside of the tab only the WebUI's own functions and buttons are used.
"use strict";

window.hyperMerge = (() => {
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const find = (selector) => root().querySelector(selector);

    // Only secure pages may write to the clipboard; elsewhere a selection is copied.
    // The panel's name begins the id of its button.
    function copy(text, panel) {
        copyFrom(find(`#hyper_merge_${panel}copy`), text);
    }

    function copyFrom(button, text) {
        const select = () => { copySelected(text); confirm(button); };
        if (navigator.clipboard && window.isSecureContext) {
            navigator.clipboard.writeText(text).then(() => confirm(button), select);
        } else {
            select();
        }
    }

    function copySelected(text) {
        const before = document.activeElement;
        const box = document.body.appendChild(document.createElement("textarea"));
        box.value = text;
        box.select();
        document.execCommand("copy");
        box.remove();
        before.focus();
    }

    const labels = new WeakMap(); // of buttons, also while they say something else
    function confirm(button) {
        labels.set(button, labels.get(button) || button.textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = labels.get(button); }, 1200);
    }

    // A text for a widget, as if it had been typed.
    function put(box, text) {
        box.value = text;
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }

    // The WebUI's own way to change the checkpoint; the app has none. Forge's menu takes only what
    // it was last filled with.
    function select(title) {
        if (title && typeof selectCheckpoint === "function") {
            press("#forge_refresh_checkpoint");
            selectCheckpoint(title);
        }
    }

    // Prompt and picked styles of the WebUI's txt2img, as Python takes them; "" where it has none.
    const picked = () => [...root().querySelectorAll("#txt2img_styles .token")];
    const label = (token) => token.querySelector("span").textContent;
    function txt2img() {
        const box = find("#txt2img_prompt textarea");
        return box ? JSON.stringify({prompt: box.value, styles: picked().map(label)}) : "";
    }

    // Everything else on that page stays as it is: negative prompt, settings, the user's own styles.
    // Nothing is sent of a run that is gone.
    function send(sent, title) {
        if (!sent) {
            return;
        }
        select(title);
        const {prompt, styles} = JSON.parse(sent);
        const box = find("#txt2img_prompt textarea");
        put(box, prompt);
        unpick(styles, styles.length);
        if (typeof switch_to_txt2img === "function") {
            switch_to_txt2img();
        }
    }

    // One at a time: the menu draws itself again after each.
    function unpick(styles, rest) {
        const token = picked().find((x) => styles.includes(label(x)));
        if (token && rest > 0) {
            token.querySelector(".token-remove").click();
            setTimeout(() => unpick(styles, rest - 1), 50);
        }
    }

    // The WebUI's own buttons that read its lists again: styles, cards, menu of checkpoints.
    const refreshers = {
        styles: ["#refresh_txt2img_styles", "#refresh_img2img_styles"],
        lists: [
            "#txt2img_lora_extra_refresh", "#img2img_lora_extra_refresh",
            "#refresh_sd_model_checkpoint", "#forge_refresh_checkpoint",
        ],
    };
    const refreshed = {};
    let refreshing = null;
    function refresh(kind, task) {
        if (kind === "styles") {
            refreshers.styles.forEach(press);
        } else if (task && task !== refreshed[kind]) {
            refreshed[kind] = task;
            clearTimeout(refreshing); // once for a run and its files: gradio 3.41 loses a second press
            refreshing = setTimeout(() => [...refreshers.styles, ...refreshers.lists].forEach(press), 500);
        }
    }

    function press(selector) {
        const button = find(selector);
        if (button) {
            button.click();
        }
    }

    // After the last of several changes, and never while one is being answered: gradio 3.41 drops those.
    let timer = null, requested = 0, again = false;
    function replan() {
        tell("changed");
        clearTimeout(timer);
        timer = setTimeout(ask, 150);
    }

    function ask() {
        if (requested && Date.now() - requested < 20000) {
            again = true;
            return;
        }
        requested = Date.now();
        press("#hyper_merge_replan");
    }

    function planned() {
        requested = 0;
        tell("changed");
        if (again) {
            again = false;
            ask();
        }
    }

    // A place on one of our tabs. What is drawn later moves it, so the page goes there twice, unless
    // the user has gone elsewhere meanwhile.
    const MOVES = ["wheel", "touchmove", "pointerdown", "keydown"];
    function go(index, name) {
        const buttons = root().querySelectorAll("#hyper_merge_tabs > .tab-nav button, #hyper_merge_tabs > div:first-child button[role=tab]");
        if (buttons[index]) {
            buttons[index].click();
        }
        const scroll = () => find(`#hyper_merge_${name}`)?.scrollIntoView({block: "start"});
        const moves = new AbortController();
        const timers = [setTimeout(scroll, 200), setTimeout(() => { scroll(); moves.abort(); }, 1000)];
        MOVES.forEach((move) => window.addEventListener(
            move, () => timers.forEach(clearTimeout), {signal: moves.signal, passive: true},
        ));
    }

    // The result of a merge that was begun on this page, which may be far from its button.
    let isExpected = false;
    function begun(isBegun) {
        isExpected = isBegun;
    }

    function reveal() {
        const isOpen = find("#hyper_merge_merge").offsetParent; // and not another tab
        const wasExpected = isExpected;
        isExpected = false;
        if (wasExpected && isOpen && find("#hyper_merge_status .hm-good") && !find("#hyper_merge_message .hm-message")) {
            go(0, "result");
        }
    }

    // A slider for each checkpoint. Multipliers mix as the checkpoints do, so the tags are sums; they
    // are those of `mixture_tags` in Python. Their values are kept when the sliders are drawn again.
    const kept = {};
    const sliders = () => [...root().querySelectorAll("#hyper_merge_mix input[type=range]")];

    function shares() {
        const moved = sliders().filter((slider) => Number(slider.value) !== 0);
        return JSON.stringify(Object.fromEntries(moved.map((x) => [x.dataset.name, Number(x.value)])));
    }

    function mix(mode) {
        const all = sliders();
        all.forEach((slider) => { slider.value = mode === "equal" ? 1 / all.length : 0; });
        mixed();
    }

    function mixed() {
        const panel = find("#hyper_merge_mix [data-terms]");
        const box = find("#hyper_merge_mix_prompt textarea");
        if (!panel || !box) {
            return;
        }
        kept[panel.dataset.run] = Object.fromEntries(sliders().map((x) => [x.dataset.name, x.value]));
        let rest = 1;
        sliders().forEach((slider) => {
            rest -= Number(slider.value);
            slider.nextElementSibling.textContent = Number(slider.value).toFixed(2);
        });
        rest = Math.abs(rest) < 1e-9 ? 0 : rest;
        const [blocks, problem] = weightsByBlock(panel);
        panel.querySelector("[data-rest]").textContent = problem + (sliders().some((x) => Number(x.value) !== 0)
            ? `The hyper-model itself has the rest: ${rest.toFixed(2)}.` : "The hyper-model alone.");
        put(box, tags(JSON.parse(panel.dataset.terms), blocks));
    }

    // What tags have at their end for the extension LoRA Block Weight, and why it is left out, if it is.
    function weightsByBlock(panel) {
        const text = find("#hyper_merge_mix_block_weights :is(textarea, input)")?.value.trim() || "";
        const value = text.replace(/^:?(lbw=|[^:,=]*:)/i, "").replace(/\s+/g, "");
        if (value && "whole" in panel.dataset) {
            return ["", "Weights by block are left out: this run has LoRAs of norms and biases, which have none. "];
        }
        if (!/^[\w.,+-]*$/.test(value)) {
            return ["", "Weights by block are left out: expected numbers such as 1,0,0 or a preset's name. "];
        }
        return [value && `:lbw=${value}`, ""];
    }

    function tags(terms, blocks) {
        const sums = new Map();
        sliders().filter((slider) => Number(slider.value) !== 0).forEach((slider) => {
            terms[slider.dataset.name].forEach(([name, unet, text]) => {
                const sum = sums.get(name) || {unet: 0, text: 0, separate: false};
                const share = Number(slider.value);
                sum.unet += share * unet;
                sum.text += share * (text === null ? unet : text);
                sum.separate = sum.separate || text !== null;
                sums.set(name, sum);
            });
        });
        const used = [...sums].filter(([, sum]) => sum.unet || sum.text);
        return used.map(([name, sum]) => {
            const numbers = sum.separate ? [sum.text, sum.unet] : [sum.unet];
            return `<lora:${name}:${numbers.map(number).join(":")}${blocks}>`;
        }).join(" ");
    }

    // Five decimals, halves to the even digit as Python does; only an odd number of 64ths is a half.
    function number(x) {
        let text = x.toFixed(5);
        if (Math.abs(x * 64) % 2 === 1 && Number(x.toFixed(6).slice(-2, -1)) % 2 === 0) {
            text = x.toFixed(6).slice(0, -1);
        }
        return Number(text) === 0 ? "0.00000" : text;
    }

    function slide(event) {
        if (event.target.matches("#hyper_merge_mix input[type=range]")) {
            event.target.value = Math.round(Number(event.target.value) * 100) / 100;
            mixed();
        } else if (event.target.closest("#hyper_merge_mix_block_weights")) {
            mixed();
        }
    }

    function redrawn() {
        const panel = find("#hyper_merge_mix [data-terms]");
        if (!panel || panel.dataset.drawn) {
            return;
        }
        panel.dataset.drawn = "yes";
        const before = kept[panel.dataset.run] || {};
        sliders().forEach((slider) => { slider.value = before[slider.dataset.name] || 0; });
        mixed();
    }

    // Where the WebUI draws progress, its bar replaces ours. It draws none that can be seen where its
    // settings say so, or as long as it has not read them, as on a page that has just been opened.
    const places = ["#hyper_merge_status", "#hyper_merge_use_status"];
    const isSeen = (bar) => bar.style.display !== "none";
    function showOneBar() {
        const bars = [...root().querySelectorAll("#hyper_merge_tab .progressDiv")];
        find("#hyper_merge_tab").classList.toggle("hm-host-bar", bars.some(isSeen));
    }

    const tasks = {};
    function follow() {
        places.forEach((place) => {
            const element = find(`${place} [data-task]`);
            if (!element || element.dataset.task === tasks[place] || typeof requestProgress !== "function") {
                return;
            }
            tasks[place] = element.dataset.task;
            requestProgress(tasks[place], find(place), null, () => { showOneBar(); tell("bar-gone"); });
        });
        showOneBar();
    }

    // What the other scripts listen for.
    function tell(what) {
        document.dispatchEvent(new Event(`hyper-merge-${what}`));
    }

    function watch() {
        const tab = find("#hyper_merge_tab");
        if (!tab) {
            setTimeout(watch, 500);
            return;
        }
        const changed = () => { follow(); redrawn(); tell("changed"); };
        new MutationObserver(changed).observe(tab, {childList: true, subtree: true});
        tab.addEventListener("input", slide);
        tab.addEventListener("click", (event) => {
            const button = event.target.closest("[data-copy]");
            if (button) {
                copyFrom(button, button.dataset.copy);
            }
        });
        changed();
    }
    setTimeout(watch); // once all scripts are there

    return {find, press, put, copy, txt2img, send, refresh, replan, planned, go, begun, reveal, mix, shares};
})();
