"""How good merges are over kinds of families, beside greedy, private LoRAs and the lower bound.

    python benchmarks/families.py [--folder FOLDER] [--kinds KIND ...] [--full-size] [--ranks R ...]
        [--setting NAME="OPTIONS" ...] [-- OPTIONS]

Makes each kind of `hyper_merge.synthetic_kinds` where it is not there yet, merges it in every setting
from one analysis, and prints a table from the runs' manifests, also kept in `FOLDER/narrow/families.md`.
Seconds are those of the solve, starts and sweeps: by the clock and, less touched by what else the
machine does, of all cores. Settings are options of `hyper-merge merge`; those after `--` go to
all of them but greedy, which is always there. The loss is plain, so what is to be compared by it should
weigh the layers plainly too:

    python benchmarks/families.py --setting even="--allocation even" --setting adaptive="" -- --layer_weights plain

The runs stay in `FOLDER/narrow/KIND/out` for `function.py`. Half an hour on two cores; full-size
families are 2.1 GB a checkpoint and take minutes and tens of gigabytes each.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tables import table

from hyper_merge.operations.merge.merge import run_merge
from hyper_merge.operations.merge.preflight import run_preflight
from hyper_merge.recipe.loading import recipe_from_options
from hyper_merge.runs.folders import MANIFEST, Folders
from hyper_merge.runs.report import Report
from hyper_merge.runtime.progress import Progress
from hyper_merge.synthetic.presets import KINDS, narrow
from hyper_merge.synthetic.writer import FamilySpec, write_family

RANKS = {"narrow": ("24", "12", "6", "3"), "full-size": ("128", "64", "32", "16")}
READING, ROUNDING = "reading and analysing", "preparing the LoRAs"  # phases around the solve
HEADS = (
    *("kind", "k", "setting", "loss", "/ greedy", "/ private", "/ bound"),
    *("MB", "sweeps", "solve s", "CPU s"),
)


class Time(NamedTuple):
    """Seconds."""

    clock: float
    cores: float

    @classmethod
    def now(cls) -> Time:
        """Returns the time since some moment."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Time) -> Time:
        """Returns the time that has passed."""
        return Time(self.clock - start.clock, self.cores - start.cores)


@dataclass(frozen=True)
class Setting:
    """A way to merge: words of the command line of `hyper-merge merge`."""

    name: str
    options: tuple[str, ...] = ()


GREEDY = Setting(  # as in the original project: the same ranks everywhere, one number for each LoRA
    "greedy",
    (
        *("--method", "greedy", "--iterations", "6"),
        *("--allocation", "even", "--multipliers", "shared"),
        *("--layer_weights", "plain"),
    ),
)
SETTINGS = (Setting("joint", ("--layer_weights", "plain")),)
"""The settings that are compared with greedy by default."""


@dataclass(frozen=True)
class Result:
    """One merge."""

    kind: str
    setting: str
    report: Report
    solving: Time  # starts and sweeps
    greedy: float  # loss

    @property
    def ratios(self) -> tuple[float, float, float]:
        """The loss as a multiple of greedy's, of private LoRAs' of the same bytes, and of the bound."""
        others = self.greedy, self.report.private_loss, self.report.bound
        return tuple(self.report.loss / other if other else float("nan") for other in others)

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        report = self.report
        return (
            *(self.kind, str(len(report.checkpoints)), self.setting, f"{report.loss:.4f}"),
            *(f"{ratio:.3f}" for ratio in self.ratios),
            *(f"{report.bytes_loras / 1e6:.2f}", str(len(report.losses))),
            *(f"{seconds:.1f}" for seconds in self.solving),
        )


@dataclass
class Watch:
    """Takes the times at which the phases of a run are reported."""

    first: dict[str, Time] = field(default_factory=dict)
    last: dict[str, Time] = field(default_factory=dict)

    def on_progress(self, phase: str, _fraction: float) -> None:
        """Notes the time."""
        self.last[phase] = Time.now()
        self.first.setdefault(phase, self.last[phase])


def main() -> None:
    """Merges every kind in every setting, and prints the table."""
    options = _options()
    size = "full-size" if options.full_size else "narrow"
    folder = options.folder / size
    # All ways in the same bytes for a rank: the original project knows 16 bits alone.
    ranks = ("--ranks", *(options.ranks or RANKS[size]), "--lora_dtype", "same")
    settings = (GREEDY, *(_with(options.rest, setting) for setting in options.setting or SETTINGS))
    results = []
    for kind in options.kinds:
        spec = KINDS[kind] if options.full_size else narrow(KINDS[kind])
        models = make_kind(folder / kind, spec)
        greedy = None
        with tempfile.TemporaryDirectory(dir=models[0].parent) as cache:
            for setting in settings:
                request = replace(setting, options=(*ranks, *setting.options))
                result = _merge(kind, models, request, Path(cache))
                greedy = greedy or result.report.loss
                results.append(replace(result, greedy=greedy))
                print("  ".join(results[-1].cells), file=sys.stderr, flush=True)
        text = table(HEADS, [*(result.cells for result in results), *_means(results)])
        (folder / "families.md").write_text(text + "\n")  # what there is, should this be stopped
    print(text)


def make_kind(folder: Path, spec: FamilySpec) -> list[Path]:
    """Returns the checkpoints of a family in its folder, written unless the same ones are there."""
    names = [f"{folder.name}_{index}" for index in range(spec.count)]
    paths = [folder / f"{name}.safetensors" for name in names]
    description = folder / "spec.txt"
    is_there = description.exists() and description.read_text() == repr(spec)
    if not is_there or not all(path.exists() for path in paths):
        write_family(folder, spec, names, overwrite=True)
        description.write_text(repr(spec))
    return paths


def _merge(kind: str, models: Sequence[Path], setting: Setting, cache: Path) -> Result:
    """Runs one merge, from the analysis in the cache if there is one."""
    output = models[0].parent / "out"
    words = {"name": [setting.name], "models": list(map(str, models)), "overwrite": ["true"]}
    recipe = recipe_from_options({**words, "output": [str(output)], **_words(setting.options)})
    watch, folders = Watch(), replace(Folders.under(recipe.output), cache=cache)
    preflight, start = run_preflight(recipe, folders), Time.now()
    merged = run_merge(preflight, Progress(watch.on_progress))
    manifest = json.loads((merged.place.folder / MANIFEST).read_text(encoding="utf-8"))
    report = Report.from_dict(manifest["report"])
    solving = watch.first[ROUNDING].since(watch.last.get(READING, start))
    return Result(kind, setting.name, report, solving, report.loss)


def _words(options: Sequence[str]) -> dict[str, list[str]]:
    """Words of a command line by key, as `recipe_from_options` takes them; a flag is true."""
    values: dict[str, list[str]] = {}
    for word in options:
        if word.startswith("--"):
            words = values[word.removeprefix("--").replace("-", "_")] = []
        else:
            words.append(word)
    return {key: words or ["true"] for key, words in values.items()}


def _means(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Returns the last rows: means of ratios and times of every setting, and the worst of its ratios."""
    rows = []
    for name in dict.fromkeys(result.setting for result in results):
        own_results = [result for result in results if result.setting == name]
        ratios = list(zip(*(result.ratios for result in own_results), strict=True))
        mean = fmean(result.report.loss for result in own_results)
        times = map(fmean, zip(*(r.solving for r in own_results), strict=True))
        rest = ("", "", *(f"{seconds:.1f}" for seconds in times))
        rows.append(("mean", "", name, f"{mean:.4f}", *(f"{fmean(r):.3f}" for r in ratios), *rest))
        rows.append(("worst", "", name, "", *(f"{max(r):.3f}" for r in ratios), *[""] * 4))
    return rows


def _with(options: Sequence[str], setting: Setting) -> Setting:
    return replace(setting, options=(*setting.options, *options))


def _setting(text: str) -> Setting:
    name, _, options = text.partition("=")
    return Setting(name, tuple(shlex.split(options)))


def _options() -> argparse.Namespace:
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND")
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--ranks", nargs="+")
    parser.add_argument(
        "--setting",
        action="append",
        type=_setting,
        metavar='NAME="OPTIONS"',
        help="instead of joint",
    )
    options = parser.parse_args(words[:end])
    options.rest = words[end + 1 :]
    return options


if __name__ == "__main__":
    main()
