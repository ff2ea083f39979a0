"""The tab as a person sees it: what can be read on it, and what can be clicked."""

import re
import time

import gradio

PREFIX = "#hyper_merge_"
SIZES = ("ranks", "size", "share")  # fields that agree, of one value of the form
PAUSE = 50  # milliseconds between two looks at the page
# A page may ask for one thing after another; those of gradio 3 open a socket for each.
QUIET = 14 if gradio.__version__.startswith("3.") else 6  # looks at a quiet page


class Traffic:
    """What a page has asked the server for and has not been answered yet."""

    def __init__(self, page) -> None:
        self.page, self.requests, self.sockets, self.count = page, set(), set(), 0
        page.on("request", self._began)
        page.on("requestfinished", self._ended)
        page.on("requestfailed", self._ended)
        page.on("websocket", self._connected)

    def _began(self, request) -> None:
        self.count += 1
        if "/heartbeat/" not in request.url:  # of gradio 4, as long as the page is open
            self.requests.add(request)

    def _ended(self, request) -> None:
        self.requests.discard(request)

    def _connected(self, socket) -> None:
        self.count += 1
        self.sockets.add(socket)

    def forget_streams(self):
        """Leaves out streams of answers: gradio 4 closes some without an event that tells of it.

        gradio 3.41 leaves a socket open now and then where the machine is busy with other work.
        """
        self.requests = {x for x in self.requests if "/queue/data" not in x.url}
        self.sockets.clear()

    def until_quiet(self, seconds):
        """Waits until all is answered and nothing more is asked; returns whether it came to that."""
        quiet, end = 0, time.monotonic() + seconds
        while quiet < QUIET and time.monotonic() < end:
            known = self.count
            self.page.wait_for_timeout(PAUSE)
            answered = not self.requests and all(socket.is_closed() for socket in self.sockets)
            quiet = quiet + 1 if answered and known == self.count else 0
        return quiet == QUIET


class Tab:
    """The tab on a playwright page."""

    def __init__(self, page) -> None:
        self.page, self.traffic, self.is_open, self._errors = page, Traffic(page), False, []
        page.on("pageerror", lambda error: self._errors.append(str(error)))
        page.on("console", self._read_console)

    def _read_console(self, entry) -> None:
        if entry.type == "error":
            self._errors.append(entry.text)

    def take_errors(self):
        """Returns what the page has complained of since it was last asked."""
        errors, self._errors = self._errors, []
        return errors

    def find(self, name):
        return self.page.locator(PREFIX + name).first  # gradio 4 gives the id of HTML twice

    def open(self, server):
        self.page.goto(server.url)
        self.find("merge").wait_for(state="attached")
        self.show()
        self.find("merge").wait_for()
        # each of these is the last answer of those that a page asks for when it opens
        self.until(lambda: self.text("runs_table", visible=False))
        self.until(self.has_inspected_all)
        self.is_open = True
        return self

    def has_inspected_all(self):
        """Tells whether the list of checkpoints is there, and what each file is."""
        note = self.text("available_note", visible=False)
        return note and "still to be" not in note

    def show(self):
        """Chooses the tab among those of a WebUI."""
        # gradio 3.41 does not say of these buttons that they are tabs
        button = self.page.locator("#tabs button", has_text="Hyper-Merge")
        if button.count():
            button.first.click()
        return self

    def close(self):
        """Closes the page, not while the server still answers it.

        gradio 3.41 writes errors into its log of a page that goes while it is being answered.
        """
        self.traffic.until_quiet(seconds=5)
        self.page.close()

    def click(self, name):
        self.find(name).click()

    def text(self, name, *, visible=True):
        element = self.find(name)
        return (element.inner_text() if visible else element.text_content() or "").strip()

    def field(self, name):
        if name in SIZES:
            return self.page.locator(f"#hyper_merge_size [data-size={name}]")
        return self.find(name).locator("input, textarea").first

    def type(self, name, text):
        self.field(name).fill(text)

    def value(self, name):
        return self.field(name).input_value()

    def sizes(self):
        """Returns ranks, size and share as their fields show them."""
        return tuple(self.value(name) for name in SIZES)

    def pick_run(self, name):
        """Clicks on a run's row in the tab "Runs"."""
        row = self.page.locator(f'#hyper_merge_runs_table [data-run="{name}"]').first
        row.locator("td").nth(1).click()
        self.until(lambda: "hm-picked" in row.get_attribute("class"))

    def pick(self, *names):
        """Ticks checkpoints in the list."""
        for name in names:
            box = self.row("available", name).locator("input")
            self.until(lambda box=box: box.count())
            box.check()
        self.until(lambda: set(names) <= set(self.picked()))

    def row(self, place, name):
        """The row of a checkpoint in the list or in the table."""
        return self.find(place).locator(f'[data-name="{name}"]')

    def choose(self, name, option):
        """Chooses one entry of a dropdown.

        A list that is filled again while it is open shows only what is like the entry that was chosen
        before, and one that is filled later forgets its entry: it is opened again then.
        """
        self.until(lambda: self._clicked(name, option) and self._holds(name, option))

    def _holds(self, name, option):
        """Returns whether a dropdown has come to show an entry within three seconds."""
        end = time.monotonic() + 3
        while self.value(name) != option and time.monotonic() < end:
            self.page.wait_for_timeout(PAUSE)
        return self.value(name) == option

    def _clicked(self, name, option, typed=None):
        from playwright.sync_api import TimeoutError as Timeout

        box = self.find(name).locator("input")
        box.click()
        if typed:
            box.fill(typed)
        try:
            self.option(name, option).click(timeout=3000)
        except Timeout:
            box.blur()
            return False
        return True

    def option(self, name, text):
        del name  # the list hangs elsewhere in the page in some versions
        return (
            self.page.locator("ul.options li")
            .filter(has_text=re.compile(rf"^\W*{re.escape(text)}\W*$"))
            .first
        )

    def picked(self):
        rows = self.find("checkpoints_table").locator("tr[data-name]")
        return rows.evaluate_all("rows => rows.map((row) => row.dataset.name)")

    def fraction(self):
        """Percent of the run as the status line says it; None where nothing runs."""
        match = re.search(r"(\d+)\s?%", self.text("status", visible=False))
        return int(match[1]) if match else None

    def until(self, holds, seconds=120):
        """Waits for something to be true, and returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            result = holds()
            if result:
                return result
            self.page.wait_for_timeout(PAUSE)
        raise AssertionError(
            f"not within {seconds} s; the status is {self.text('status')!r}, "
            f"the message {self.text('message')!r}, the focus {self.focus()!r}"
        )

    def focus(self):
        """Returns the beginning of the element that keys go to."""
        return self.page.evaluate("document.activeElement.outerHTML.slice(0, 120)")

    def settle(self):
        """Waits for all answers, so that none of them changes the page later."""
        if not self.traffic.until_quiet(30):
            self.traffic.forget_streams()
            asked = [request.url for request in self.traffic.requests]
            assert self.traffic.until_quiet(30), (asked, self.traffic.count)

    def merge(self, seconds=60):
        """Presses Merge and waits for the result of a run with another name than the last one's.

        Its status may read like the last one's: two runs can take the same time.
        """
        before = self.text("sentence", visible=False)
        self.click("merge")
        self.until(lambda: self.text("sentence", visible=False) != before, seconds)
        self.until(lambda: "Done" in self.text("status"), seconds)
        self.until(lambda: self.find("sentence").is_visible())

    def to(self, title):
        """Goes to another tab, which reads its lists again."""
        self.page.get_by_role("tab", name=title, exact=True).or_(
            self.page.locator("#hyper_merge_tabs .tab-nav button", has_text=title)
        ).first.click()
        self.traffic.until_quiet(seconds=10)
