// Which files a picker shows, in which order, and which go together; rows that are dragged.
"use strict";

window.hyperMergeOrder = (() => {
    const {stem, folder, shorten} = window.hyperMergeNames;
    const isSound = (file) => file.known && !file.problem;

    // What others must go with: the first picked file that can be merged, and the file names that are taken.
    const measureOf = (picked) => ({first: picked.find(isSound), stems: new Map(picked.map((file) => [stem(file.name), file.name]))});

    // Why a file cannot go with the picked ones; "" where it can, or where that is not known yet.
    function obstacleOf(file, {first, stems}) {
        if (!file.known || file.problem) {
            return file.problem || "";
        }
        if (first && first.family !== file.family) {
            return `${file.family}; the picked ones are ${first.family}`;
        }
        if (first && first.kind !== file.kind) {
            return `other tensors than ${shorten([first.name]).get(first.name)}`;
        }
        const twin = stems.get(stem(file.name));
        return twin && twin !== file.name ? `the same file name as ${twin}` : "";
    }

    const orders = {
        name: (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true, sensitivity: "base"}),
        time: (a, b) => (b.time || 0) - (a.time || 0) || orders.name(a, b),
        size: (a, b) => (b.size || 0) - (a.size || 0) || orders.name(a, b),
        family: (a, b) => (a.family || "~").localeCompare(b.family || "~") || orders.name(a, b),
    };

    // The files that search and folder leave, in the chosen order. A search finds name, family, and what `more`
    // says of a file.
    function matching(files, search, place, order, more = (file) => file.dtype || "") {
        const words = search.toLowerCase().split(/\s+/).filter(Boolean);
        const isIn = (name) => place === "*" || folder(name) === place
            || (place !== "" && folder(name).startsWith(`${place}/`));
        const holds = (file) => {
            const text = `${file.name} ${file.family || ""} ${more(file)}`.toLowerCase();
            return words.every((word) => text.includes(word));
        };
        return files.filter((file) => isIn(file.name) && holds(file)).sort(orders[order] || orders.name);
    }

    // A redraw under a pressed button would swallow its click: it waits until the button is let go. Another press
    // may have begun by then, and other keys are let go in between.
    function holdRedraws(draw) {
        let isHeld = false, isStale = false, timer = null;
        const hold = () => {
            clearTimeout(timer);
            isHeld = true;
        };
        const release = () => {
            clearTimeout(timer);
            timer = setTimeout(() => { // after its click
                isHeld = false;
                if (isStale) {
                    draw();
                }
            });
        };
        const isPress = (event) => event.key === " "; // which presses when it is let go
        ["pointerup", "pointercancel"].forEach((name) => document.addEventListener(name, release));
        document.addEventListener("keyup", (event) => isPress(event) && release());
        window.addEventListener("blur", release); // whatever is let go elsewhere is not heard of
        return {
            pointed: hold,
            pressed: (event) => isPress(event) && hold(),
            mustWait: () => { isStale = isHeld; return isHeld; },
        };
    }

    // What a form's text field holds once it has been drawn. gradio may hand over the value before the last.
    const whenDrawn = (field, take) => setTimeout(() => take(field().querySelector("textarea, input").value));

    // A row of a table follows pointer or finger, and is put where it is let go.
    function dragRow(row, put) {
        const rows = () => [...row.parentElement.children];
        const follow = (moved) => {
            moved.preventDefault();
            row.classList.add("hm-dragged");
            const over = rows().find((other) => {
                const box = other.getBoundingClientRect();
                return other !== row && moved.clientY >= box.top && moved.clientY <= box.bottom;
            });
            if (over) {
                const isBelow = rows().indexOf(over) > rows().indexOf(row);
                over[isBelow ? "after" : "before"](row);
            }
        };
        const end = () => {
            document.removeEventListener("pointermove", follow);
            row.classList.remove("hm-dragged");
            const place = row.isConnected ? rows().indexOf(row) : -1;
            setTimeout(() => { if (place >= 0) { put(place); } }); // when drawing is allowed again
        };
        document.addEventListener("pointermove", follow);
        document.addEventListener("pointerup", end, {once: true});
        document.addEventListener("pointercancel", end, {once: true});
    }

    return {isSound, measureOf, obstacleOf, matching, holdRedraws, whenDrawn, dragRow};
})();
