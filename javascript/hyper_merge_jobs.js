// The title of the page and a notification say how far a job is, and how it ended, to people who look
// elsewhere meanwhile.
"use strict";

(() => {
    const {find} = window.hyperMerge;
    const ENDS = {done: "✓ Done", refused: "✗ Failed", failed: "✗ Failed"}; // who stops a job knows it
    const OURS = /^(?:✓ Done|✗ Failed|\d+%) · /;
    const watched = new Set(); // the tasks that this page saw running
    let end = "";

    // The WebUIs write their own progress in front of the title, and take it away at the end.
    const own = () => document.title.replace(OURS, "");
    const setTitle = (text) => {
        const title = text ? `${text} · ${own()}` : own();
        if (document.title !== title) {
            document.title = title;
        }
    };

    function follow() {
        const running = find("#hyper_merge_tab [data-task]");
        const ended = [...document.querySelectorAll("#hyper_merge_tab [data-ended]")]
            .find((x) => watched.has(x.dataset.ended));
        find("#hyper_merge_tab").classList.toggle("hm-may-ask", Boolean(running) && mayAsk());
        if (running) {
            watched.add(running.dataset.task);
            end = "";
            if (typeof requestProgress !== "function") {
                setTitle(`${running.dataset.percent}%`);
            }
        } else if (ended) {
            watched.delete(ended.dataset.ended);
            announce(ENDS[ended.dataset.outcome] || "", ended.textContent.trim());
        }
    }

    function announce(word, text) {
        end = word;
        setTitle(word);
        if (word && isAllowed("granted") && !document.hasFocus()) {
            new Notification("Hyper-Merge", {body: text, tag: "hyper-merge"}).onclick = () => window.focus();
        }
    }

    // The WebUI's bar may go after our own, and takes its title with it.
    document.addEventListener("hyper-merge-bar-gone", () => setTitle(end));

    function looked() {
        if (end && document.visibilityState === "visible") {
            end = "";
            setTitle("");
        }
    }
    ["focus", "pointermove", "pointerdown", "keydown"].forEach((name) => {
        window.addEventListener(name, looked);
    });
    document.addEventListener("visibilitychange", looked);

    // Browsers have no notifications on pages that are not secure.
    const isAllowed = (state) => "Notification" in window && Notification.permission === state;
    const mayAsk = () => window.isSecureContext && isAllowed("default");
    document.addEventListener("click", (event) => {
        if (event.target.closest("#hyper_merge_notify")) {
            Notification.requestPermission().then(follow);
        }
    });
    document.addEventListener("hyper-merge-changed", follow);
})();
