"""What the user asks for: frozen, validated, from YAML or options, to YAML and metadata.

Knows no checkpoint: whether the files exist and fit together is seen in the preflight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.fields import AVERAGE, FIELDS, Field
from hyper_merge.recipe.parsing import PrivateLoraTarget, suggest_nearest
from hyper_merge.recipe.yaml_file import Setting, read_settings

__all__ = [
    "AVERAGE",
    "FIELDS",
    "Field",
    "Recipe",
    "SettingError",
    "load_recipe",
    "option_help",
    "parse_settings",
    "recipe_from_options",
    "recipe_from_settings",
]

DEFAULT_RANKS = (128, 64, 32, 16)
DEFAULT_ITERATIONS = 30
DEFAULT_TOLERANCE = 2e-3

_SIZES = {"ranks", "budget", "target"}  # of which one is given

Options = Mapping[str, str | Sequence[str]]


class SettingError(RecipeError):
    """A setting is refused; its place is still to be named.

    Attributes:
        key: Of the setting.
        problem: Expected and got, in words.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f'recipe, key "{key}": {problem}')
        self.key = key
        self.problem = problem


def parse_settings(order: Any, parsers: Mapping[str, Callable[[Any], Any]]) -> None:
    """Turns the fields of a frozen dataclass, as it is made, into what their parsers make of them.

    Raises:
        SettingError: the first field that is refused.
    """
    for field in fields(order):
        try:
            value = parsers[field.name](getattr(order, field.name))
        except RecipeError as error:
            raise SettingError(field.name, str(error)) from None
        object.__setattr__(order, field.name, value)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a merge; every value is checked when it is made.

    Values in the form of YAML (lists, texts of paths) are turned into the types below.

    Attributes:
        name: Name of the hyper-model, and first part of the LoRAs' names.
        models: Paths of the checkpoints, two or more.
        ranks: One per LoRA; found in the merge where a budget or a target is given.
        budget: Bytes of all LoRA files together, or None.
        target: Share 0..1 that is to come back of every checkpoint, or None.
        topup: Private LoRAs for the checkpoints that the shared ones serve worst, or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Of the written files.
        lora_dtype: Of the LoRAs' factors, where it is not the `same`.
        iterations: Sweeps at most.
        tolerance: Fraction of the loss; a sweep that changes it by less is the last.
        weights: One per checkpoint, not normalised; None for equal weights.
        base: `average`, or the path of the checkpoint that deviations are taken from.
        output: WebUI-shaped models folder.
        overwrite: Whether existing files may be replaced.
        seed: Of everything random.
        method: `joint`, or `greedy` as in the original project.
        allocation: `even`: the ranks hold in every layer; `adaptive`: their bytes go where they
            bring back most.
        multipliers: Whether the text encoder has `separate` ones, or one number is `shared`.
        fit_weights: How much each checkpoint counts in the fit, not normalised; None for equally.
        layer_weights: Whether differences count `relative` to each layer's weight, which is nearer to
            what the network does with them, or `plain`.
        vae: Whose VAE the hyper-model gets: that of the `first` checkpoint, or the `average`.
        exact: What companions of the LoRAs hold: `none`, the UNet's `norms`, or `all` (biases too).
    """

    name: str
    models: tuple[Path, ...]
    ranks: tuple[int, ...] = DEFAULT_RANKS
    budget: int | None = None
    target: float | None = None
    topup: PrivateLoraTarget | None = None
    device: str = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    lora_dtype: Literal["same", "float16", "bfloat16", "float32", "float8"] = "same"
    iterations: int = DEFAULT_ITERATIONS
    tolerance: float = DEFAULT_TOLERANCE
    weights: tuple[float, ...] | None = None
    base: str = AVERAGE
    output: Path = Path("models")
    overwrite: bool = False
    seed: int = 0
    method: Literal["joint", "greedy"] = "joint"
    allocation: Literal["adaptive", "even"] = "adaptive"
    multipliers: Literal["separate", "shared"] = "separate"
    fit_weights: tuple[float, ...] | None = None
    layer_weights: Literal["plain", "relative"] = "relative"
    vae: Literal["first", "average"] = "first"
    exact: Literal["none", "norms", "all"] = "none"

    def __post_init__(self) -> None:
        parse_settings(self, {field.name: field.parse for field in FIELDS})
        if self.budget is not None and self.target is not None:
            raise SettingError("target", "expected a budget or a target, got both; leave one out")
        if self.finds_ranks and (self.allocation == "even" or self.method == "greedy"):
            raise SettingError(
                "budget" if self.target is None else "target",
                "goes with adaptive allocation and the joint method alone; give ranks in its place",
            )
        for name in ("weights", "fit_weights"):
            weights = getattr(self, name)
            if weights is not None and len(weights) != len(self.models):
                raise SettingError(
                    name,
                    f"expected {len(self.models)} numbers, one per checkpoint, got {len(weights)}",
                )

    @property
    def finds_ranks(self) -> bool:
        """Whether the merge finds the ranks, by a budget or a target."""
        return self.budget is not None or self.target is not None

    @property
    def factors_dtype(self) -> str:
        """The word for the LoRAs' type."""
        return self.dtype if self.lora_dtype == "same" else self.lora_dtype

    def to_yaml(self) -> str:
        """A YAML file that `load_recipe` reads back as an equal recipe."""
        shown = [f for f in FIELDS if not (f.name == "ranks" and self.finds_ranks)]
        return "".join(f"{f.name}:{_yaml_value(getattr(self, f.name))}\n" for f in shown)

    def to_settings(self) -> dict[str, Any]:
        """All fields as plain JSON values, paths absolute; see `recipe_from_settings`."""
        settings = {field.name: getattr(self, field.name) for field in FIELDS}
        base = self.base if self.base == AVERAGE else Path(self.base)
        return {name: _plain(value) for name, value in {**settings, "base": base}.items()}

    def to_metadata(self) -> dict[str, str]:
        """The settings as texts for a file's metadata; paths are cut to file names."""
        return {f.name: f.show(getattr(self, f.name)) for f in FIELDS if f.show is not None}


def load_recipe(path: Path, overrides: Options | None = None) -> Recipe:
    """The recipe of a YAML file.

    Relative paths of checkpoints are taken from the current folder, as in the original project;
    where nothing is there, but beside the YAML file there is, that file is meant.

    Args:
        path: The YAML file.
        overrides: Words from the command line by key; they win over the file.

    Raises:
        RecipeError: The file cannot be read, or a setting is unknown, missing or impossible.
    """
    settings = read_settings(path)
    for key in ("models", "base"):
        if key in settings:
            found = _beside(settings[key].value, path.parent)
            settings[key] = Setting(found, settings[key].where)
    options = _option_settings(overrides or {})
    if _SIZES & options.keys():
        settings = {key: setting for key, setting in settings.items() if key not in _SIZES}
    return _build({**settings, **options}, str(path))


def recipe_from_options(options: Options) -> Recipe:
    """The recipe that the command line alone describes.

    Args:
        options: Words by key; `name` and `models` are needed.

    Raises:
        RecipeError: A setting is unknown, missing or impossible.
    """
    return _build(_option_settings(options), "command line")


def recipe_from_settings(settings: Mapping[str, object], where: str) -> Recipe:
    """The recipe that `Recipe.to_settings` described, equal but for paths that were relative.

    Args:
        settings: Plain values by key.
        where: What holds them, for messages.

    Raises:
        RecipeError: A setting is unknown, missing or impossible.
    """
    given = {key: Setting(value, f'{where}, key "{key}"') for key, value in settings.items()}
    # Ranks stand beside the budget or the target that found them.
    sizes: dict[str, Any] = {
        key: given.pop(key).value for key in ("budget", "target") if key in given
    }
    recipe = _build(given, where)
    try:
        return replace(recipe, **sizes)
    except SettingError as error:
        raise RecipeError(f'{where}, key "{error.key}": {error.problem}') from None


def option_help(field: Field) -> str:
    """The help text of a setting's option, with its default."""
    default = next(f.default for f in fields(Recipe) if f.name == field.name)
    if default is MISSING or default is None or default is False:
        return field.help
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{field.help} (default: {shown})"


def _option_settings(options: Options) -> dict[str, Setting]:
    known = {field.name: field for field in FIELDS}
    for key in options:
        if key not in known:
            raise _unknown(f"option --{key}", key)
    return {
        key: Setting(known[key].from_text(text), f"option {known[key].option}")
        for key, text in options.items()
    }


def _build(settings: Mapping[str, Setting], source: str) -> Recipe:
    names = [field.name for field in FIELDS]
    for key, setting in settings.items():
        if key not in names:
            raise _unknown(setting.where, key)
    missing = [key for key in ("name", "models") if key not in settings]
    if missing:
        raise RecipeError(
            f'{source}: expected the key "{missing[0]}", got only '
            f"{', '.join(settings) or 'nothing'}; add {missing[0]}: in the YAML file or "
            f"--{missing[0]} on the command line"
        )
    values: dict[str, Any] = {key: setting.value for key, setting in settings.items()}
    _require_one_size(settings)
    try:
        return Recipe(**values)
    except SettingError as error:
        where = settings[error.key].where
        raise RecipeError(f"{where}: {error.problem}") from None


def _require_one_size(settings: Mapping[str, Setting]) -> None:
    given = [
        key for key in sorted(_SIZES) if key in settings and settings[key].value not in (None, "")
    ]
    if len(given) > 1:
        raise RecipeError(
            f"{settings[given[1]].where}: expected one of ranks, budget and target, got"
            f" {' and '.join(given)}; leave {'one' if len(given) == 2 else 'two'} out"
        )


def _unknown(where: str, key: str) -> RecipeError:
    names = [field.name for field in FIELDS]
    advice = suggest_nearest(key, names) or "."
    return RecipeError(f"{where}: unknown key{advice} Known keys are {', '.join(names)}")


def _beside(value: object, folder: Path) -> object:
    """`value` with each relative path that exists only under `folder` replaced by that."""
    if isinstance(value, list):
        return [_beside(item, folder) for item in value]
    if not isinstance(value, str) or value == AVERAGE or _exists(Path(value)):
        return value
    return str(folder / value) if _exists(folder / value) else value


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte: refused later, by its message
        return False


def _plain(value: object) -> object:
    """What JSON can hold, from which the field's parser makes the value again."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PrivateLoraTarget):
        return str(value)
    return str(value.absolute()) if isinstance(value, Path) else value


def _yaml_value(value: object) -> str:
    """What follows the colon, with its blank; paths stand one a line."""
    if isinstance(value, tuple):
        items = [_yaml_scalar(item) for item in value]
        is_paths = isinstance(value[0], Path)
        return "".join(f"\n  - {item}" for item in items) if is_paths else f" [{', '.join(items)}]"
    return f" {_yaml_scalar(value)}"


def _yaml_scalar(value: object) -> str:
    if isinstance(value, str | Path | PrivateLoraTarget):
        # always quoted: some names would read as numbers
        return yaml.safe_dump(str(value), default_style='"', width=float("inf")).strip()
    return "null" if value is None else str(value).lower()
