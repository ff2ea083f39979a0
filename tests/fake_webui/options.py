"""`shared.opts` and what settings pages are made of."""

import json
from pathlib import Path


class OptionInfo:
    """One setting; a component of its own is called with label, value and elem_id."""

    def __init__(  # noqa: PLR0917 - the original's order
        self,
        default=None,
        label="",
        component=None,
        component_args=None,
        onchange=None,
        section=None,
        refresh=None,
        comment_before="",
        comment_after="",
        infotext=None,
        restrict_api=False,
        category_id=None,
    ):
        self.default = default
        self.label = label
        self.component = component
        self.component_args = component_args
        self.onchange = onchange
        self.section = section
        self.refresh = refresh
        self.comment_before = comment_before
        self.comment_after = comment_after
        self.infotext = infotext
        self.restrict_api = restrict_api
        self.category_id = category_id
        self.do_not_save = False

    def info(self, text):
        self.comment_after += f"<span class='info'>({text})</span>"
        return self


class OptionHTML(OptionInfo):
    """Text on a page."""

    def __init__(self, text):
        import gradio as gr

        super().__init__(str(text).strip(), component=gr.HTML)
        self.do_not_save = True


class Options:
    """Values by key; those never set have their default, those marked so are never kept."""

    def __init__(self, errors, cmd_opts):
        self._errors = errors
        self._cmd_opts = cmd_opts
        self.data_labels = {}
        self.data = {}

    def __getattr__(self, key):
        if key in self.data:
            return self.data[key]
        if key in self.data_labels:
            return self.data_labels[key].default
        raise AttributeError(key)

    def add_option(self, key, info):
        self.data_labels[key] = info
        if key not in self.data and not info.do_not_save:
            self.data[key] = info.default

    def same_type(self, x, y):
        if x is None or y is None:
            return True
        return {int: float}.get(type(x), type(x)) == {int: float}.get(type(y), type(y))

    def set(self, key, value, is_api=False, run_callbacks=True):
        if key == "sd_model_checkpoint":  # the hosts' own setting, which is on no page here
            changed = self.data.get(key) != value
            self.data[key] = value
            return changed
        info = self.data_labels[key]
        hidden = isinstance(info.component_args, dict) and not info.component_args.get(
            "visible", True
        )
        if self.data.get(key) == value or info.do_not_save or hidden:
            return False
        self.data[key] = value
        return True

    def save(self, filename):
        Path(filename).write_text(json.dumps(self.data, indent=4), encoding="utf-8")

    def load(self, filename):
        try:
            self.data = json.loads(Path(filename).read_text(encoding="utf-8"))
        except FileNotFoundError:
            self.data = {}
        except ValueError:
            self._errors.report(f"Could not load settings {filename}", exc_info=True)
            self.data = {}

    def dumpjson(self):
        return json.dumps({k: self.data.get(k, v.default) for k, v in self.data_labels.items()})


def apply(opts, values, filename):
    """Apply settings: every value of the page is checked against its default's type, then set."""
    for (key, info), value in zip(opts.data_labels.items(), values, strict=True):
        assert opts.same_type(value, info.default), f"Bad value for setting {key}: {value}"
    items = zip(opts.data_labels, values, strict=True)
    changed = [key for key, value in items if opts.set(key, value)]
    opts.save(filename)
    return f"{len(changed)} settings changed: {', '.join(changed)}."
