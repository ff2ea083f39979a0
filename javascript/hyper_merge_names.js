// How checkpoints are called and shown: short names, rows of the list to pick from, the table of the picked ones.
"use strict";

window.hyperMergeNames = (() => {
    const ENDING = /\.(safetensors|ckpt|pt|pth)$/i;

    // Names without folder, extension and what all begin with, as far as whole words go.
    const stem = (name) => name.split("/").pop().replace(ENDING, "");
    const folder = (name) => name.split("/").slice(0, -1).join("/");
    const folders = (name) => { // its own and those around it, which may hold nothing but folders
        const parts = folder(name).split("/");
        return parts.map((_, i) => parts.slice(0, i + 1).join("/"));
    };
    function shorten(names) {
        const stems = names.map(stem);
        const [first = "", ...others] = [...stems].sort();
        const last = others.length ? others[others.length - 1] : "";
        let end = 0;
        while (end < first.length && first[end] === last[end]) {
            end += 1;
        }
        const prefix = first.slice(0, end).match(/^.*[\s._-]/)?.[0] ?? "";
        const rests = stems.map((text) => text.slice(prefix.length));
        const fits = rests.every((text) => text) && new Set(rests).size === names.length;
        return new Map(names.map((name, i) => [name, fits ? rests[i] : stems[i]]));
    }

    function element(tag, attributes = {}, ...children) {
        const made = document.createElement(tag);
        Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
        made.append(...children);
        return made;
    }

    // A name is broken behind its own marks, never within a word; the whole one is its tooltip.
    function nameElement(text, whole) {
        const parts = text.match(/[^\s._-]*[\s._-]*/g).flatMap((part) => [part, element("wbr")]);
        return element("span", {class: "hm-name", title: whole}, ...parts);
    }

    // A reason stands below the name of its file, and need not begin with it again.
    const reasonOf = (why, name) => {
        const begin = `${name.split("/").pop()} `;
        return why.startsWith(begin) ? why.slice(begin.length) : why;
    };

    function formatSize(bytes) {
        const units = [[1e9, "GB", 2], [1e6, "MB", 0], [1e3, "kB", 0]];
        const [unit, word, digits] = units.find(([least]) => bytes >= least) || [1, "B", 0];
        return `${(bytes / unit).toFixed(digits)} ${word}`;
    }

    const formatDay = (seconds) => new Date(seconds * 1000).toLocaleDateString(undefined, {dateStyle: "medium"});

    function listRow(file, isPicked, why, isActive) {
        const box = element("input", {type: "checkbox", "data-part": "box", tabindex: isActive ? 0 : -1});
        box.checked = isPicked;
        if (why) {
            box.setAttribute("aria-disabled", "true");
        }
        const facts = [
            file.family, file.made ? "hyper-model" : "", file.size ? formatSize(file.size) : "",
            file.time ? formatDay(file.time) : "",
        ].filter(Boolean).join(" · ");
        const place = folder(file.name);
        const label = element(
            "label", {}, box, nameElement((place ? `${place}/` : "") + stem(file.name), file.name),
            element("span", {class: "hm-facts"}, reasonOf(why, file.name) || facts || "…"),
        );
        return element("li", {"data-name": file.name, ...(why ? {class: "hm-unfit"} : {})}, label);
    }

    // One row per picked file, in their order; a reason for each that cannot be merged with the others.
    function checkpointTable(rows, reasons) {
        const vaes = letters(rows), names = shorten(rows.map((file) => file.name));
        const isHashed = rows.some((file) => file.hash);
        const head = ["", "Checkpoint", "Family", "Size", "Precision", ...(isHashed ? ["Short hash"] : []), "VAE", ""];
        const hidden = {0: "Order", [head.length - 1]: "Remove"};
        const top = element("tr", {}, ...head.map((text, i) => element(
            "th", {scope: "col", ...(text === "Size" ? {class: "hm-number"} : {})},
            text || element("span", {class: "hm-unseen"}, hidden[i]),
        )));
        const body = rows.map((file, i) => tableRow(file, i, names.get(file.name), vaes[i], reasons[i], isHashed, rows.length));
        return element("table", {}, element("thead", {}, top), element("tbody", {}, ...body));
    }

    function tableRow(file, index, name, vae, why, isHashed, count) {
        const grip = element("button", {
            type: "button", class: "hm-grip", "data-part": "grip", title: "Drag, or move by the arrow keys",
            "aria-label": `Move ${name}, ${index + 1} of ${count}, by the arrow keys`,
        }, "⠿");
        const cross = element("button", {
            type: "button", class: "hm-cross", "data-part": "cross", "aria-label": `Remove ${name}`, title: "Remove",
        }, "✕");
        const title = element("th", {scope: "row"}, nameElement(name, file.name));
        if (why) {
            title.append(element("div", {class: "hm-problem"}, reasonOf(why, file.name)));
        }
        const cells = [
            element("td", {class: "hm-tool"}, grip), title,
            element("td", {}, file.family || (file.known ? "" : "…")),
            element("td", {class: "hm-number"}, file.size ? formatSize(file.size) : ""),
            element("td", {}, file.dtype || ""),
            ...(isHashed ? [element("td", {}, element("code", {}, file.hash || ""))] : []),
            element("td", {}, vae), element("td", {class: "hm-tool"}, cross),
        ];
        return element("tr", {"data-name": file.name}, ...cells);
    }

    // `same` where all of several have one VAE, else a letter for each of them.
    function letters(rows) {
        const vaes = [...new Set(rows.map((file) => file.vae).filter((vae) => vae && vae !== "none"))];
        return rows.map((file) => {
            if (file.problem || file.vae === undefined) {
                return file.problem ? "" : "…";
            }
            if (file.vae === "none") {
                return "none";
            }
            const index = vaes.indexOf(file.vae);
            return rows.length === 1 ? "included" : vaes.length === 1 ? "same" : index < 26 ? String.fromCharCode(65 + index) : String(index + 1);
        });
    }

    return {stem, folder, folders, shorten, element, reasonOf, listRow, checkpointTable};
})();
