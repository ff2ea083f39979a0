"""`modules.styles`: prompt styles in csv files."""

import csv
import shutil
from pathlib import Path
from typing import NamedTuple


class PromptStyle(NamedTuple):
    """A style; `path` is its file, None until it is saved."""

    name: str
    prompt: str | None
    negative_prompt: str | None
    path: str | None = None


class StyleDatabase:
    """Styles of one or several files; with several, headings may stand among them."""

    def __init__(self, paths, errors, *, headings=True):
        self._errors = errors
        self._headings = headings
        self.paths = [Path(path) for path in paths]
        self.default_path = self.paths[0]
        self.no_style = PromptStyle("None", "", "", None)
        self.styles = {}
        self.reload()

    def reload(self):
        self.styles.clear()
        for path in self.paths:
            if self._headings and len(self.paths) > 1:
                heading = f" {path.stem.upper()} ".center(40, "-")
                self.styles[heading] = PromptStyle(heading, None, None, "do_not_save")
            if path.is_file():
                self._load(path)

    def _load(self, path):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for row in csv.DictReader(file, skipinitialspace=True):
                    if row["name"].startswith("#"):
                        continue
                    name, prompt = row["name"], row["prompt"]
                    negative = row.get("negative_prompt", "")
                    self.styles[name] = PromptStyle(name, prompt, negative, str(path))
        except Exception:
            self._errors.report(f"Error loading styles from {path}: ", exc_info=True)

    def save_styles(self, path=None):
        for style in list(self.styles.values()):
            if not style.path:
                self.styles[style.name] = style._replace(path=str(self.default_path))
        files = {str(self.default_path)} | {style.path for style in self.styles.values()}
        for file in files - {"do_not_save"}:
            if Path(file).exists():
                shutil.copy(file, f"{file}.bak")
            with Path(file).open("w", encoding="utf-8-sig", newline="") as out:
                writer = csv.DictWriter(out, ["name", "prompt", "negative_prompt"])
                writer.writeheader()
                for style in self.styles.values():
                    if style.path == file:
                        row = style._asdict()
                        row.pop("path")
                        writer.writerow(row)

    def apply_styles_to_prompt(self, prompt, names):
        for name in names:
            text = self.styles.get(name, self.no_style).prompt
            if "{prompt}" in text:
                prompt = text.replace("{prompt}", prompt)
            else:
                prompt = ", ".join(part for part in (prompt.strip(), text.strip()) if part)
        return prompt
