// What gradio's widgets lack for the keyboard and for screen readers, and what is wider than its place.
"use strict";

(() => {
    const {find} = window.hyperMerge;
    const all = (selector) => [...(find("#hyper_merge_tab")?.querySelectorAll(selector) ?? [])];

    // The page is watched: nothing is written where it stands already.
    function set(element, attributes) {
        Object.entries(attributes).forEach(([name, value]) => {
            if (element.getAttribute(name) !== String(value)) {
                element.setAttribute(name, value);
            }
        });
    }

    // gradio 3.41 makes the heads of its accordions of plain elements, which no key reaches.
    function mendAccordions() {
        all(".label-wrap").forEach((head) => {
            const isButton = head.tagName === "BUTTON";
            set(head, {"aria-expanded": head.classList.contains("open"), ...(isButton ? {} : {role: "button", tabindex: 0})});
        });
    }

    // It makes tabs of plain buttons too.
    function mendTabs() {
        all("#hyper_merge_tabs > .tab-nav").forEach((bar) => {
            set(bar, {role: "tablist"});
            [...bar.children].forEach((tab) => set(tab, {role: "tab", "aria-selected": tab.classList.contains("selected")}));
        });
    }

    // gradio 4 calls the box of a menu the list itself.
    function mendMenus() {
        all("input[role=listbox]").forEach((box) => {
            set(box, {role: "combobox"});
            box.removeAttribute("aria-controls"); // of no element
        });
    }

    // What is longer than its menu is cut there.
    function mendLongChoices() {
        all(".wrap .secondary-wrap input").forEach((box) => set(box, {title: box.scrollWidth > box.clientWidth ? box.value : ""}));
    }

    // The crosses of what is picked in a menu.
    function mendCrosses() {
        all(".token-remove").forEach((cross) => {
            const name = cross.closest(".token")?.querySelector("span")?.textContent.replaceAll("\u200b", "").trim();
            set(cross, {role: "button", tabindex: 0, "aria-label": name ? `Remove ${name}` : "Remove all"});
        });
    }

    // A picked name is broken behind its own marks. gradio goes on writing into the same text.
    const MARKS = /([._-])(?=[^\s\u200b])/g;
    function mendPickedNames() {
        all(".token > span").flatMap((name) => [...name.childNodes]).forEach((text) => {
            const broken = text.data?.replace(MARKS, "$1\u200b");
            if (text.data !== broken) {
                text.data = broken;
            }
        });
    }

    function mendScrolled() {
        all(".hm-scroll").forEach((place) => {
            const isWide = place.scrollWidth > place.clientWidth + 1;
            place.classList.toggle("hm-wide", isWide);
            if (isWide || place.scrollHeight > place.clientHeight + 1) {
                set(place, {tabindex: 0, role: "region", "aria-label": "Scrolls"});
            } else {
                ["tabindex", "role", "aria-label"].forEach((name) => place.removeAttribute(name));
            }
        });
    }

    // Once for many changes, and not put off by more of them.
    const parts = [mendAccordions, mendTabs, mendMenus, mendLongChoices, mendCrosses, mendPickedNames, mendScrolled];
    let isDue = false;
    function mend() {
        if (!isDue) {
            isDue = true;
            setTimeout(() => { isDue = false; parts.forEach((part) => part()); }, 50);
        }
    }

    document.addEventListener("hyper-merge-changed", mend);
    document.addEventListener("click", mend);
    window.addEventListener("resize", mend);
    // Keys press what is no button of the browser's. gradio 4 would keep the Tab key for itself on a cross.
    document.addEventListener("keydown", (event) => {
        const part = event.target.closest?.("#hyper_merge_tab :is(div.label-wrap, .token-remove)");
        if (!part) {
            return;
        }
        event.stopPropagation();
        if (event.key === "Enter" || event.key === " ") {
            const box = part.closest(".wrap")?.querySelector("input"); // a cross that is gone has no focus
            event.preventDefault();
            part.click();
            setTimeout(() => document.activeElement === document.body && box?.focus(), 100);
        }
    }, true);
})();
