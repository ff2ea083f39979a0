// The choice of a size: three fields and a curve that agree. What was filled in last, in whichever field,
// stands in the form's own widget, which is hidden; the others follow it.
"use strict";

(() => {
    const {find, put} = window.hyperMerge;
    const boxes = () => [...document.querySelectorAll("#hyper_merge_size [data-size]")];
    const form = () => find("#hyper_merge_ranks input, #hyper_merge_ranks textarea");
    const slider = () => find("#hyper_merge_size input[type=range]");

    // As Python reads the form's text.
    const SIZE = /^([\d.]+)\s*(?:([kmg])(i?)b?|b)$/i;
    const UNIT = /(?:^|[^a-z])(?:[kmg]i?b?|b)$/i;
    function kindOf(text) {
        return text.includes("%") ? "share" : UNIT.test(text.trim()) ? "size" : "ranks";
    }

    function bytesOf(text) {
        const [, count = 0, unit = "", binary] = SIZE.exec(text.trim()) || [];
        return Number(count) * (binary ? 1024 : 1000) ** " kmg".indexOf(unit.toLowerCase() || " ");
    }

    function sizeText(bytes) {
        const [unit, word] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([x]) => bytes >= 0.9995 * x) || [1, "B"];
        return `${Number((bytes / unit).toPrecision(3))} ${word}`;
    }

    // Only a whole is 100 %.
    const percent = (share) => `${share >= 1 ? 100 : Math.min(share * 100, 99.9).toFixed(1)} %`;

    // Sizes rise by one factor: a place on the curve is a number between 0 and the last size's.
    const last = (curve) => curve.sizes.length - 1;
    function along(values, place) {
        const low = Math.min(Math.floor(place), values.length - 2);
        return values[low] + (place - low) * (values[low + 1] - values[low]);
    }
    const sizeAt = (curve, place) => Math.exp(along(curve.sizes.map(Math.log), place));
    function placeWhere(values, value) {
        const after = values.findIndex((x) => x >= value);
        if (after <= 0) {
            return after; // -1: out of reach
        }
        return after - 1 + (value - values[after - 1]) / (values[after] - values[after - 1]);
    }

    // The bytes that a text asks for; nothing where it asks for a share.
    const askedBytes = (choice, text) => ({size: bytesOf(text), ranks: choice.size})[kindOf(text)];

    function placeOf(choice, text) {
        if (kindOf(text) === "share") {
            const place = placeWhere(choice.worst, parseFloat(text) / 100);
            return place < 0 ? null : place;
        }
        const bytes = askedBytes(choice, text);
        if (!bytes) {
            return null;
        }
        const place = placeWhere(choice.sizes.map(Math.log), Math.log(bytes));
        return place < 0 ? last(choice) : place;
    }

    function followers(choice, text, place) {
        if (place === null) {
            return {size: choice.size && kindOf(text) === "ranks" ? sizeText(choice.size) : ""};
        }
        return {
            size: sizeText(askedBytes(choice, text) || sizeAt(choice, place)),
            ranks: choice.ranks[Math.round(place)],
            share: percent(along(choice.worst, place)),
        };
    }

    function fill() {
        const source = find("#hyper_merge_size_choice [data-choice]");
        if (!form() || !boxes().length) {
            return;
        }
        const text = form().value;
        const choice = source ? JSON.parse(source.dataset.choice) : {};
        if (choice.text !== text) {
            choice.size = null; // of ranks that were there before
        }
        draw(source, Boolean(choice.sizes));
        const place = choice.sizes ? placeOf(choice, text) : null;
        const isWord = /^\s*[a-z]+\s*$/i.test(text); // for ranks that follow the number of checkpoints
        const shown = isWord && choice.text === text && choice.asked ? choice.asked : text;
        const values = {...followers(choice, text, place), [kindOf(text)]: shown};
        boxes().forEach((box) => {
            if (box !== document.activeElement) {
                box.value = values[box.dataset.size] || "";
            }
            box.parentElement.classList.toggle("hm-decides", box.dataset.size === kindOf(text));
        });
        if (choice.sizes) {
            mark(choice, place, text);
        }
    }

    // The page is watched: it must not change where nothing is new.
    function say(text) {
        const readout = find("#hyper_merge_size .hm-readout");
        if (readout.textContent !== text) {
            readout.textContent = text;
            slider().setAttribute("aria-valuetext", text);
        }
    }

    function draw(source, isKnown) {
        const chart = find("#hyper_merge_size .hm-chart");
        const lines = chart.querySelector(".hm-lines");
        chart.hidden = !isKnown;
        if (isKnown && lines.innerHTML !== source.innerHTML) {
            lines.innerHTML = source.innerHTML;
        }
    }

    function mark(choice, place, text) {
        const chart = find("#hyper_merge_size .hm-chart");
        const line = chart.querySelector(".hm-mark");
        slider().max = last(choice);
        line.hidden = place === null;
        if (place === null) {
            say("Click on the curve to choose a size.");
            return;
        }
        const mean = along(choice.mean, place), worst = along(choice.worst, place);
        line.style.left = `${100 * place / last(choice)}%`;
        [mean, worst].forEach((share, index) => { line.children[index].style.bottom = `${100 * share}%`; });
        say(`${sizeText(askedBytes(choice, text) || sizeAt(choice, place))}: about ${percent(mean)} explained in the mean,`
            + ` ${percent(worst)} at worst (${choice.names[Math.round(place)]})`);
        if (slider() !== document.activeElement) {
            slider().value = place;
        }
    }

    function write(text) {
        put(form(), text);
        fill();
    }

    // What stands in a field is meant as what the field is for, also where it cannot be that: so an error
    // names the right one. A part of one is a share too.
    const UNITS = {size: " MB", share: " %"};
    function typed(box) {
        const kind = box.dataset.size, text = box.value.trim();
        if (kind === "share" && /^0?\.\d+$/.test(text)) {
            write(`${Number((Number(text) * 100).toPrecision(9))} %`);
        } else {
            write(text && kindOf(text) !== kind ? text + (UNITS[kind] || "") : text);
        }
    }

    document.addEventListener("input", (event) => {
        if (event.target.matches("#hyper_merge_size [data-size]")) {
            typed(event.target);
        } else if (event.target === slider()) {
            const choice = JSON.parse(find("#hyper_merge_size_choice [data-choice]").dataset.choice);
            write(sizeText(sizeAt(choice, Number(event.target.value))));
        }
    });
    document.addEventListener("focusout", (event) => {
        if (event.target.closest("#hyper_merge_size")) {
            setTimeout(fill); // once the focus has gone
        }
    });
    document.addEventListener("hyper-merge-changed", fill);
})();
