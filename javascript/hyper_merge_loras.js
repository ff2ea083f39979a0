// The picker of LoRAs: a list of the host's LoRAs to pick from, beside a table of the picked ones, each with a
// multiplier where they are added up.
"use strict";

window.hyperMergeLoras = (() => {
    const {find: select, put} = window.hyperMerge;
    const find = (name) => select(`#hyper_merge_lora_${name}`);
    const names = () => window.hyperMergeNames; // of scripts that come later
    const order = () => window.hyperMergeOrder;
    const TRIES = 5; // to hear of more facts
    const SHOWN = 500; // rows of the list at most; a search finds the others
    let files = new Map(); // name -> what Python knows of the file
    let picked = []; // names with their multipliers, as text
    let waiting = []; // names that are added once it is known that they can go with the others
    let active = null; // name of the row in the list that the Tab key reaches
    let asked = "", tries = 0, reminder = null; // files that were known when more were asked for
    let weighs = false; // whether the multipliers count
    let held = null; // what is pressed

    const fact = (name) => files.get(name) || {name, known: true, problem: "no longer in the list; press Refresh"};
    const isPicked = (name) => picked.some(([other]) => other === name);
    const isSound = (file) => order().isSound(file);

    // Why a file cannot go with the picked ones; "" where it can, or where that is not known yet.
    function obstacle(file) {
        const others = picked.map(([name]) => name).filter((name) => name !== file.name);
        return order().obstacleOf(file, order().measureOf(others.map(fact)));
    }

    const shown = () => order().matching([...files.values()], find("search").value, find("folder").value,
        find("order").value, (file) => `rank ${file.rank || ""}`);

    // From Python: the list, or more of what is known about its files.
    function list(text) {
        if (!text) {
            return;
        }
        files = new Map(JSON.parse(text).map((row) => [row.name, row]));
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
            if (!isPicked(name) && !obstacle(fact(name))) { // each addition counts for the next
                picked.push([name, "1"]);
            }
        });
        if (picked.length !== before) {
            send();
        }
    }

    // While facts are missing. After an answer that brought none, which gradio 4 gives where it hands over the
    // value before the last one, a few times more: files of other types of disks may hang.
    function askForMore() {
        const known = [...files.values()].filter((file) => file.known).length;
        clearTimeout(reminder);
        tries = asked === `${known} of ${files.size}` ? tries + 1 : 0;
        asked = `${known} of ${files.size}`;
        if (known < files.size && tries <= TRIES) {
            reminder = setTimeout(() => find("inspect").click(), tries ? 500 : 0);
        }
    }

    // From Python or from ourselves: the picked LoRAs as the form has them.
    const pick = () => order().whenDrawn(() => find("picked"), take);

    function take(text) {
        const picks = JSON.parse(text || "[]");
        if (JSON.stringify(picks) !== JSON.stringify(picked)) {
            picked = picks;
            draw();
        }
    }

    function send() {
        put(find("picked").querySelector("textarea, input"), JSON.stringify(picked));
    }

    function change(picks) {
        picked = picks;
        draw();
        send();
    }

    const remove = (name) => change(picked.filter(([other]) => other !== name));

    function toggle(name) {
        if (isPicked(name)) {
            remove(name);
        } else if (!obstacle(fact(name))) {
            change([...picked, [name, "1"]]);
        }
    }

    function clear() {
        waiting = [];
        change([]);
    }

    // All that are shown, without what Hyper-Merge has made. If nothing is picked yet, the family with the
    // most of them is meant.
    function addAll() {
        const others = shown().filter((file) => !file.ours && !isPicked(file.name));
        const counts = new Map();
        others.filter(isSound).forEach((file) => counts.set(file.family, (counts.get(file.family) || 0) + 1));
        const most = Math.max(...counts.values());
        const leading = others.find((file) => isSound(file) && counts.get(file.family) === most);
        waiting = [...(leading ? [leading] : []), ...others].map((file) => file.name);
        settle();
        draw();
        tries = 0;
        askForMore();
    }

    // Whether every LoRA has a multiplier.
    function weigh(isNeeded) {
        weighs = isNeeded;
        draw();
    }

    function drawFolders() {
        const box = find("folder"), value = box.value || "*";
        const folders = [...new Set([...files.keys()].map(names().folder))].sort();
        const options = [["*", "All folders"], ...folders.map((name) => [name, name || "Top folder only"])];
        if (folders.length < 2) {
            options.length = 1;
        }
        box.replaceChildren(...options.map(([key, text]) => names().element("option", {value: key}, text)));
        box.value = options.some(([key]) => key === value) ? value : "*";
        box.hidden = options.length < 2;
    }

    function draw() {
        if (!held || held.mustWait()) {
            return;
        }
        const part = document.activeElement?.dataset?.part, name = nameOf(document.activeElement);
        drawList();
        drawTable();
        if (name && part) {
            focusOn(part, name);
        }
    }

    function drawList() {
        const all = shown(), rows = all.slice(0, SHOWN);
        if (!rows.some((file) => file.name === active)) {
            active = rows[0]?.name;
        }
        const reasons = new Map(all.map((file) => [file.name, isPicked(file.name) ? "" : obstacle(file)]));
        const facts = (file) => ({...file, made: false, family: file.family && `${file.family} · rank ${file.rank}`});
        find("available").replaceChildren(...rows.map((file) => names().listRow(
            facts(file), isPicked(file.name), reasons.get(file.name), file.name === active,
        )));
        const unfit = [...reasons.values()].filter(Boolean).length;
        const unknown = [...files.values()].filter((file) => !file.known).length;
        const notes = [
            all.length === files.size ? `${files.size} LoRAs` : `${all.length} of ${files.size} LoRAs`,
            ...(all.length > SHOWN ? [`the first ${SHOWN} are shown`] : []),
            ...(unfit ? [`${unfit} cannot be added, grey`] : []),
            ...(unknown ? [`${unknown} still to be inspected`] : []),
        ];
        find("available_note").textContent = files.size ? `${notes.join("; ")}.`
            : "There are no LoRAs in the folder yet. Put some there and press Refresh.";
    }

    function drawTable() {
        const place = find("table"), {element} = names();
        const first = picked.map(([name]) => fact(name)).find(isSound);
        find("picked_note").textContent = picked.length ? `${picked.length} picked${first ? `, of ${first.family}` : ""}.` : "";
        if (!picked.length) {
            place.replaceChildren(element("div", {class: "hm-message hm-info", role: "status"}, "Pick LoRAs of one base."));
            return;
        }
        const scroll = place.firstElementChild?.scrollTop || 0;
        place.replaceChildren(element("div", {class: "hm-scroll"}, table()));
        place.firstElementChild.scrollTop = scroll;
    }

    function table() {
        const {element, shorten} = names();
        const short = shorten(picked.map(([name]) => name));
        const head = ["LoRA", ...(weighs ? ["Multiplier"] : []), "Rank", ""];
        const top = element("tr", {}, ...head.map((text) => element(
            "th", {scope: "col", ...(["Rank", "Multiplier"].includes(text) ? {class: "hm-number"} : {})},
            text || element("span", {class: "hm-unseen"}, "Remove"),
        )));
        const rows = picked.map(([name, multiplier]) => tableRow(fact(name), short.get(name), multiplier));
        return element("table", {}, element("thead", {}, top), element("tbody", {}, ...rows));
    }

    function tableRow(file, name, multiplier) {
        const {element} = names(), why = obstacle(file);
        const {reasonOf} = window.hyperMergeNames;
        const title = element("th", {scope: "row", title: file.name}, name);
        if (why) {
            title.append(element("div", {class: "hm-problem"}, reasonOf(why, file.name)));
        }
        const box = element("input", {
            type: "text", inputmode: "decimal", class: "hm-multiplier", "data-part": "multiplier", value: multiplier,
            "aria-label": `Multiplier of ${name}`, title: "How strongly it counts: 1 as it is, 0.5 half, -1 taken away",
        });
        const cross = element("button", {
            type: "button", class: "hm-cross", "data-part": "cross", "aria-label": `Remove ${name}`, title: "Remove",
        }, "✕");
        return element(
            "tr", {"data-name": file.name}, title,
            ...(weighs ? [element("td", {class: "hm-number"}, box)] : []),
            element("td", {class: "hm-number"}, String(file.rank || (file.known ? "" : "…"))),
            element("td", {class: "hm-tool"}, cross),
        );
    }

    const nameOf = (target) => (isOurs(target) ? target.closest("[data-name]")?.dataset.name : undefined);
    const isOurs = (target) => Boolean(target?.closest?.("#hyper_merge_lora_picker"));

    function focusOn(part, name) {
        [...find("picker").querySelectorAll(`[data-part=${part}]`)].find((x) => nameOf(x) === name)?.focus();
    }

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
            const place = picked.findIndex(([other]) => other === name);
            const next = (picked[place + 1] || picked[place - 1] || [])[0];
            remove(name);
            focusOn("cross", next);
        }
    }

    function pressed(event) {
        held.pressed(event);
        const steps = {ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity};
        const step = steps[event.key];
        if (step === undefined || event.target.dataset.part !== "box") {
            return;
        }
        event.preventDefault();
        const boxes = [...find("available").querySelectorAll("[data-part=box]")];
        const index = Math.max(0, Math.min(boxes.length - 1, boxes.indexOf(event.target) + step));
        event.target.tabIndex = -1;
        boxes[index].tabIndex = 0;
        boxes[index].focus();
        active = nameOf(boxes[index]);
    }

    function typed(event) {
        if (["search", "order", "folder"].some((name) => event.target === find(name))) {
            draw();
        } else if (event.target.dataset.part === "multiplier") {
            const name = nameOf(event.target);
            picked = picked.map(([other, x]) => [other, other === name ? event.target.value : x]);
            send();
        }
    }

    function begin() {
        if (!window.hyperMergeOrder || !find("available")) {
            setTimeout(begin, 200);
            return;
        }
        held = order().holdRedraws(draw);
        find("available_note").after(find("row")); // the buttons stand below the list, also where the table is
        const tab = select("#hyper_merge_tab");
        const listen = (name, answer) => tab.addEventListener(name, (event) => isOurs(event.target) && answer(event));
        listen("click", clicked);
        listen("keydown", pressed);
        listen("pointerdown", held.pointed);
        listen("input", typed);
        drawFolders();
        draw();
    }
    begin();

    return {list, pick, addAll, clear, weigh};
})();
