"""What an extension registers, and where its errors go."""

import sys
import traceback


class Errors:
    """`modules.errors`: writes to standard error and remembers."""

    def __init__(self):
        self.reports = []  # whole texts, for tests

    def report(self, message, *, exc_info=False):
        self._write(f"*** {message}\n" + (traceback.format_exc() if exc_info else ""))

    def display(self, e, task, *, full_traceback=False):
        lines = traceback.format_exception(type(e), e, e.__traceback__)
        self._write(f"{task or 'error'}: {type(e).__name__}\n{''.join(lines)}")

    def _write(self, text):
        self.reports.append(text)
        sys.stderr.write(text)


class Callbacks:
    """`modules.script_callbacks`: an error in one is logged, and the next goes on."""

    def __init__(self, errors):
        self._errors = errors
        self.callback_map = {}

    def clear_callbacks(self):
        self.callback_map.clear()

    def _add(self, kind, callback):
        self.callback_map.setdefault(kind, []).append(callback)

    def on_ui_tabs(self, callback, *, name=None):
        self._add("ui_tabs", callback)

    def on_ui_settings(self, callback, *, name=None):
        self._add("ui_settings", callback)

    def on_app_started(self, callback, *, name=None):
        self._add("app_started", callback)

    def on_before_ui(self, callback, *, name=None):
        self._add("before_ui", callback)

    def on_script_unloaded(self, callback, *, name=None):
        self._add("script_unloaded", callback)

    def _run(self, kind, *args):
        results = []
        for callback in self.callback_map.get(kind, []):
            try:
                results += callback(*args) or []
            except Exception:  # noqa: PERF203 - each by itself
                self._errors.report(f"Error executing callback {kind}", exc_info=True)
        return results

    def before_ui_callback(self):
        self._run("before_ui")

    def ui_tabs_callback(self):
        return self._run("ui_tabs")

    def ui_settings_callback(self):
        self._run("ui_settings")

    def app_started_callback(self, demo, app):
        self._run("app_started", demo, app)
