// The form as this browser saw it last: what differs from the page's own values is kept between visits.
"use strict";

window.hyperMergeForm = (() => {
    const KEY = "hyper-merge-form";
    let first = null; // the values of a page that nobody has touched, by the host's settings

    // Browsers may refuse their memory, as in private windows; then nothing is remembered.
    function recall() {
        try {
            return window.localStorage.getItem(KEY) || "";
        } catch {
            return "";
        }
    }

    function kept(values) {
        first = values;
        return recall();
    }

    function keep(names, values) {
        if (!first) {
            return;
        }
        const changed = names.map((name, i) => [name, values[i]])
            .filter(([, value], i) => JSON.stringify(value) !== JSON.stringify(first[i]));
        const form = Object.fromEntries(changed);
        if (form.checkpoints !== undefined) {
            form.checkpoints = JSON.parse(form.checkpoints || "[]");
        }
        try {
            if (JSON.stringify(form) !== JSON.stringify(JSON.parse(recall() || "{}").form)) {
                window.localStorage.setItem(KEY, JSON.stringify({time: Date.now() / 1000, form}));
            }
        } catch {
            // see above
        }
    }

    const mayDelete = (name) => !name || window.confirm(`Delete the preset ${name}?`);

    return {kept, keep, mayDelete};
})();
