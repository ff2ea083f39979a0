// The picker: a list of the WebUI's checkpoints to pick from, beside a table of the picked ones in their order.
"use strict";

window.hyperMergePicker = (() => {
    const root = () => (typeof gradioApp === "function" ? gradioApp() : document);
    const find = (name) => root().querySelector(`#hyper_merge_${name}`);
    const {folders, shorten, element, listRow, checkpointTable} = window.hyperMergeNames;
    const SHOWN = 500; // rows of the list at most; a search finds the others
    let files = new Map(); // name -> what Python knows of the file
    let picked = []; // names in their order
    let waiting = []; // names that are added once it is known that they can go with the others
    let active = null; // name of the row in the list that the Tab key reaches
    let asked = -1; // facts that were known when more were asked for
    let heard = "", lateOnes = 0, reminder = null; // of what Python says
    let held = null; // what is pressed

    const {isSound, measureOf, obstacleOf, matching, holdRedraws, whenDrawn, dragRow} = window.hyperMergeOrder;
    const short = (name) => shorten([name]).get(name);
    const fact = (name) => files.get(name) || {name, known: true, problem: "no longer in the list; press Refresh"};
    const measure = () => measureOf(picked.map(fact));
    const obstacle = (file, others = measure()) => obstacleOf(file, others);
    const shown = () => matching([...files.values()], find("search").value, find("folder").value, find("order").value);

    // From Python: the list, or more of what is known about its files. A WebUI that is filling its list has
    // none or a part of it for a moment, and gradio 4 may hand over the value before the last answer's: Python
    // is asked again, also after other names than before.
    function list(text) {
        const isLate = !text || text === "[]" || (text === heard && isLacking());
        lateOnes = isLate ? lateOnes + 1 : 0;
        const rows = JSON.parse(text || "[]");
        const isOther = rows.length !== files.size || rows.some((row) => !files.has(row.name));
        if ((isLate && lateOnes <= 5) || (!isLate && isOther)) {
            clearTimeout(reminder); // answers in between leave it
            reminder = setTimeout(() => find("inspect").click(), isLate ? 500 : 1000);
        }
        if (!text || (text === heard && !isLacking())) { // a redraw would change nothing
            return;
        }
        heard = text;
        files = new Map(rows.map((row) => [row.name, row]));
        settle();
        drawFolders();
        draw();
        askForMore();
    }

    // Adds what waited for its facts, one row after another as they come.
    function settle() {
        const known = waiting.filter((name) => fact(name).known);
        waiting = waiting.filter((name) => !fact(name).known);
        const before = picked.length;
        known.forEach((name) => {
            if (!picked.includes(name) && !obstacle(fact(name))) { // each addition counts for the next
                picked.push(name);
            }
        });
        if (picked.length !== before) {
            send();
        }
    }

    const isLacking = () => [...files.values()].some((file) => !file.known)
        || picked.some((name) => isSound(fact(name)) && fact(name).vae === undefined);

    // While facts are missing, unless the last answer brought none: files of other types of disks may hang.
    function askForMore() {
        const known = [...files.values()].reduce((sum, x) => sum + !!x.known + (x.vae !== undefined), 0);
        if (isLacking() && known !== asked) {
            asked = known;
            find("inspect").click();
        }
    }

    // From Python or from ourselves: the picked names as the form has them.
    const pick = () => whenDrawn(() => find("checkpoints"), take);

    function take(text) {
        const names = JSON.parse(text || "[]");
        if (JSON.stringify(names) !== JSON.stringify(picked)) {
            picked = names;
            draw();
        }
        asked = -1;
        askForMore();
    }

    function send() {
        const box = find("checkpoints").querySelector("textarea, input");
        box.value = JSON.stringify(picked);
        box.dispatchEvent(new Event("input", {bubbles: true}));
    }

    function change(names) {
        picked = names;
        draw();
        send();
    }

    function toggle(name) {
        if (picked.includes(name)) {
            remove(name);
        } else if (!obstacle(fact(name))) {
            change([...picked, name]);
        }
    }

    function remove(name) {
        change(picked.filter((other) => other !== name));
    }

    function clear() {
        waiting = [];
        change([]);
    }

    // All that are shown, without hyper-models of earlier merges. If nothing is picked yet, the kind with
    // the most of them is meant.
    function addAll() {
        const names = shown().filter((file) => !file.made && !picked.includes(file.name));
        const counts = new Map();
        names.filter(isSound).forEach((file) => counts.set(file.kind, (counts.get(file.kind) || 0) + 1));
        const most = Math.max(...counts.values());
        const leading = names.find((file) => isSound(file) && counts.get(file.kind) === most);
        waiting = [...(leading ? [leading] : []), ...names].map((file) => file.name);
        settle();
        draw();
        asked = -1;
        askForMore();
    }

    function move(name, place) {
        const names = picked.filter((other) => other !== name);
        const index = Math.max(0, Math.min(names.length, place));
        if (picked[index] !== name) {
            names.splice(index, 0, name);
            change(names);
            say(`${short(name)} is now ${index + 1} of ${names.length}${index ? "" : ", and gives the VAE"}.`);
        }
    }

    const say = (text) => { find("picked_note").textContent = text; };

    function drawFolders() {
        const box = find("folder"), value = box.value || "*";
        const names = [...new Set([...files.keys()].flatMap(folders))].sort();
        const options = [["*", "All folders"], ...names.map((name) => [name, name || "Top folder only"])];
        if (names.length < 2) {
            options.length = 1;
        }
        box.replaceChildren(...options.map(([key, text]) => element("option", {value: key}, text)));
        box.value = options.some(([key]) => key === value) ? value : "*";
        box.hidden = options.length < 2;
    }

    function draw() {
        if (!held || held.mustWait()) {
            return;
        }
        const focus = document.activeElement?.closest?.("[data-name]");
        const part = document.activeElement?.dataset?.part;
        const name = focus?.dataset.name;
        drawList();
        drawTable();
        if (name && part) {
            const same = [...root().querySelectorAll(`#hyper_merge_picker [data-part=${part}]`)]
                .find((x) => x.closest("[data-name]").dataset.name === name);
            same?.focus();
        }
    }

    function drawList() {
        const all = shown(), rows = all.slice(0, SHOWN);
        if (!rows.some((file) => file.name === active)) {
            active = rows[0]?.name;
        }
        const others = measure(), isPicked = new Set(picked);
        const reasons = new Map(all.map((file) => [file.name, isPicked.has(file.name) ? "" : obstacle(file, others)]));
        find("available").replaceChildren(...rows.map((file) => listRow(file, isPicked.has(file.name), reasons.get(file.name), file.name === active)));
        const unfit = [...reasons.values()].filter(Boolean).length;
        const unknown = [...files.values()].filter((file) => !file.known).length;
        const notes = [
            all.length === files.size ? `${files.size} checkpoints` : `${all.length} of ${files.size} checkpoints`,
            ...(all.length > SHOWN ? [`the first ${SHOWN} are shown`] : []),
            ...(unfit ? [`${unfit} cannot be added, grey`] : []),
            ...(unknown ? [`${unknown} still to be inspected`] : []),
        ];
        find("available_note").textContent = files.size ? `${notes.join("; ")}.`
            : `There are no checkpoints in ${find("picker").querySelector("[data-folder]").dataset.folder} yet. Put some there and press Refresh.`;
    }

    function drawTable() {
        const place = find("checkpoints_table");
        if (!picked.length) {
            place.replaceChildren(element(
                "div", {class: "hm-message hm-info", role: "status"},
                "Pick two or more checkpoints. They are described here.",
            ));
            say("");
            return;
        }
        const rows = picked.map(fact), others = measure();
        const reasons = rows.map((file) => obstacle(file, others));
        const scroll = place.firstElementChild?.scrollTop || 0;
        place.replaceChildren(element("div", {class: "hm-scroll"}, checkpointTable(rows, reasons)));
        place.firstElementChild.scrollTop = scroll;
        const differ = new Set(rows.map((file) => file.vae).filter((vae) => vae && vae !== "none")).size > 1;
        say([
            `${picked.length} picked; the first gives the VAE${differ ? ", and the VAEs differ" : ""}.`,
            picked.length > 1 ? "Drag a row, or move it by the arrow keys, for another order." : "",
        ].join(" "));
    }

    const nameOf = (target) => target.closest("[data-name]")?.dataset.name;

    function clicked(event) {
        const part = event.target.closest("[data-part]")?.dataset.part, name = nameOf(event.target);
        if (part === "box") {
            active = name;
            if (event.target.getAttribute("aria-disabled") === "true") {
                event.preventDefault();
            } else {
                toggle(name);
            }
        } else if (part === "cross") {
            const next = picked[picked.indexOf(name) + 1] || picked[picked.indexOf(name) - 1];
            remove(name);
            focusOn("cross", next);
        }
    }

    function focusOn(part, name) {
        [...root().querySelectorAll(`#hyper_merge_picker [data-part=${part}]`)]
            .find((x) => nameOf(x) === name)?.focus();
    }

    function pressed(event) {
        held.pressed(event);
        const part = event.target.dataset.part, name = nameOf(event.target);
        const steps = {ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity};
        const step = steps[event.key];
        if (step === undefined || !["box", "grip"].includes(part)) {
            return;
        }
        event.preventDefault();
        if (part === "grip") {
            move(name, picked.indexOf(name) + step);
            return;
        }
        const boxes = [...find("available").querySelectorAll("[data-part=box]")];
        const index = Math.max(0, Math.min(boxes.length - 1, boxes.indexOf(event.target) + step));
        event.target.tabIndex = -1;
        boxes[index].tabIndex = 0;
        boxes[index].focus();
        active = nameOf(boxes[index]);
    }

    function hold(event) {
        held.pointed();
        const grip = event.target.closest("[data-part=grip]");
        if (grip && !event.button) {
            dragRow(grip.closest("tr"), (place) => move(nameOf(grip), place));
        }
    }

    function begin() {
        const place = find("picker");
        if (!place || !find("available")) {
            setTimeout(begin, 200);
            return;
        }
        held = holdRedraws(draw);
        find("available_note").after(find("picker_row")); // below the list, wherever the table stands
        const tab = root().querySelector("#hyper_merge_tab");
        tab.addEventListener("click", (event) => { if (event.target.closest("#hyper_merge_picker")) { clicked(event); } });
        tab.addEventListener("keydown", (event) => { if (event.target.closest("#hyper_merge_picker")) { pressed(event); } });
        tab.addEventListener("pointerdown", (event) => { if (event.target.closest("#hyper_merge_picker")) { hold(event); } });
        tab.addEventListener("input", (event) => {
            if (["search", "order", "folder"].some((name) => event.target === find(name))) {
                draw();
            }
        });
        drawFolders();
        draw();
    }
    begin();

    return {list, pick, addAll, clear};
})();
