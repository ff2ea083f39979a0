"""The recipe of a merge: what the user asks for, typed and checked; to YAML, JSON and metadata.

It knows no checkpoint: whether the files exist and fit together is seen in the preflight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

from hyper_merge.errors import RecipeError, settings_placed
from hyper_merge.recipe.block_weights import BlockWeights
from hyper_merge.recipe.default_ranks import DEFAULT_WORD, RankWord, default_ranks
from hyper_merge.recipe.fields import AVERAGE, FIELD_PARSERS, FIELDS, SIZES, Field
from hyper_merge.recipe.parsing import PrivateLoraTarget
from hyper_merge.recipe.plain_values import unknown_word
from hyper_merge.recipe.request import PlaceOf, check_request, key_place, parse_request

__all__ = ["AVERAGE", "FIELDS", "Field", "Recipe", "option_help"]

DEFAULT_ITERATIONS: Final = 30
DEFAULT_TOLERANCE: Final = 2e-3

_REQUIRED: Final = ("name", "models")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a merge; every value is checked when it is made.

    Attributes:
        name: Name of the hyper-model, and first part of the LoRAs' names.
        models: Paths of the checkpoints, two or more.
        ranks: One rank per LoRA. Made of a word for them, or of nothing, it holds those of
            `default_ranks`. The merge finds them where a budget or a target is given.
        budget: Bytes of all LoRA files together, or None.
        target: Share 0..1 of every checkpoint's differences to explain, or None.
        topup: Private LoRAs for the checkpoints that the shared ones serve worst, or None.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: Type of the numbers in the written files.
        lora_dtype: Type of the numbers in the LoRAs; `same` as `dtype`, another, or `auto` for `float8`
            where it loads and loses little.
        iterations: Number of sweeps at most.
        tolerance: Fraction of the loss; the first sweep that changes it by less is the last.
        weights: One per checkpoint in the average, not normalised; None for equal weights.
        block_weights: By which a checkpoint's weight in the average is multiplied in each block of
            the UNet (`recipe.block_weights`), one entry per checkpoint; None for no difference.
        base: `average`, or the path of the checkpoint that deviations are taken from.
        output: WebUI-shaped models folder.
        overwrite: Whether existing files may be replaced.
        seed: Seed of everything random.
        method: `joint`, or `greedy` as in the original project.
        allocation: `even`: the ranks hold in every layer; `adaptive`: their bytes go where they
            explain most.
        multipliers: Whether the text encoder has `separate` ones, or one number is `shared`.
        fit_weights: How much each checkpoint counts in the fit, not normalised; None for equally.
        layer_weights: Whether a layer's differences count by what they do to the network's `output`,
            by an estimate of that from the `layout`, `relative` to the size of its weight, or
            `plain`.
        training: Number of rounds of a training of the LoRAs by runs of the network after the solve; 0 for
            none, `auto` for as many as take minutes.
        vae: Whose VAE the hyper-model gets: that of the `first` checkpoint, or the `average`.
        exact: Contents of the LoRAs' companions: `none`, the layers at the UNet's `ends`, its `norms`
            too, or `all` (biases too); `auto` for the ends where they matter.
        damaged: Whether to `refuse` files that look damaged or unfinished, or to `accept` them.
        memory: Bytes of memory that the merge may take; None for as many as suit most machines.

    Raises:
        RecipeError: a value is impossible, or contradicts another one.
    """

    name: str
    models: tuple[Path, ...]
    ranks: tuple[int, ...] = ()
    budget: int | None = None
    target: float | None = None
    topup: PrivateLoraTarget | None = None
    device: str = "auto"
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    lora_dtype: Literal["auto", "same", "float16", "bfloat16", "float32", "float8"] = "auto"
    iterations: int = DEFAULT_ITERATIONS
    tolerance: float = DEFAULT_TOLERANCE
    weights: tuple[float, ...] | None = None
    block_weights: tuple[BlockWeights, ...] | None = None
    base: str = AVERAGE
    output: Path = Path("models")
    overwrite: bool = False
    seed: int = 0
    method: Literal["joint", "greedy"] = "joint"
    allocation: Literal["adaptive", "even"] = "adaptive"
    multipliers: Literal["separate", "shared"] = "separate"
    fit_weights: tuple[float, ...] | None = None
    layer_weights: Literal["output", "layout", "relative", "plain"] = "output"
    training: int | Literal["auto"] = 0
    vae: Literal["first", "average"] = "first"
    exact: Literal["auto", "none", "ends", "norms", "all"] = "auto"
    damaged: Literal["refuse", "accept"] = "refuse"
    memory: int | None = None

    def __post_init__(self) -> None:
        ranks: tuple[int, ...] | RankWord = self.ranks or DEFAULT_WORD
        object.__setattr__(self, "ranks", ranks)
        check_request(self, FIELD_PARSERS)
        if isinstance(ranks, str):
            object.__setattr__(self, "ranks", default_ranks(len(self.models), ranks))
        with settings_placed(key_place):
            self._require_one_size()
            self._require_weights_by_checkpoint()

    @classmethod
    def parse(cls, values: Mapping[str, object], where: PlaceOf) -> Recipe:
        """Returns the recipe that a user describes.

        Args:
            values: plain values by key, as YAML has them.
            where: the place of a setting by its key, for messages; also of one that is missing.

        Raises:
            RecipeError: a setting is unknown, missing or impossible.
        """
        _require_known(values, where)
        sizes = [key for key in SIZES if values.get(key) not in (None, "")]
        with settings_placed(where):
            _require_one_of_sizes(sizes)
        return parse_request(cls, values, FIELD_PARSERS, where)

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], source: str) -> Recipe:
        """Returns the recipe that `to_settings` described, equal but for paths that were relative.

        Args:
            settings: plain values by key; ranks stand beside the budget that found them.
            source: what holds them, for messages.

        Raises:
            RecipeError: a setting is unknown, missing or impossible.
        """

        def where(key: str) -> str:
            return f'{source}, key "{key}"' if key in settings else source

        _require_known(settings, where)
        return parse_request(cls, settings, FIELD_PARSERS, where)

    @property
    def finds_ranks(self) -> bool:
        """Tells whether the merge finds the ranks, by a budget or a target."""
        return self.budget is not None or self.target is not None

    @property
    def has_even_ranks(self) -> bool:
        """Tells whether every layer has the same ranks: greedy deflation knows no others."""
        return self.allocation == "even" or self.method == "greedy"

    @property
    def factors_dtype(self) -> str:
        """Word for the type of the numbers in the LoRAs, once `auto` is decided by the files."""
        return self.dtype if self.lora_dtype in ("auto", "same") else self.lora_dtype

    def to_settings(self) -> dict[str, Any]:
        """Returns all fields as plain JSON values, paths absolute; see `from_settings`."""
        settings = {field.name: getattr(self, field.name) for field in FIELDS}
        base = self.base if self.base == AVERAGE else Path(self.base)
        return {name: _json_value(value) for name, value in {**settings, "base": base}.items()}

    def to_metadata(self) -> dict[str, str]:
        """Returns the settings as texts for a file's metadata; paths are cut to file names."""
        return {
            field.name: field.to_metadata(getattr(self, field.name))
            for field in FIELDS
            if field.to_metadata is not None
        }

    def _require_one_size(self) -> None:
        sizes = [key for key in ("budget", "target") if getattr(self, key) is not None]
        _require_one_of_sizes(sizes)
        if sizes and self.has_even_ranks:
            raise RecipeError(
                "goes with adaptive allocation and the joint method alone",
                hint="give ranks in its place",
                key=sizes[0],
            )

    def _require_weights_by_checkpoint(self) -> None:
        kinds = {"weights": "numbers", "fit_weights": "numbers", "block_weights": "texts"}
        for key, kind in kinds.items():
            weights = getattr(self, key)
            if weights is not None and len(weights) != len(self.models):
                raise RecipeError(
                    f"expected {len(self.models)} {kind}, one per checkpoint, got {len(weights)}",
                    key=key,
                )


def option_help(field: Field) -> str:
    """Returns the help text of a setting's option, with its default."""
    default = next(f.default for f in fields(Recipe) if f.name == field.name)
    if field.name == "ranks":
        default = DEFAULT_WORD
    if default is MISSING or default is None or default is False:
        return field.help
    return f"{field.help} (default: {default})"


def unknown_setting(key: str, where: str) -> RecipeError:
    """Returns the refusal of a setting that does not exist."""
    error = unknown_word(RecipeError, "unknown key", key, FIELD_PARSERS, "Known keys are")
    error.key, error.where = key, where
    return error


def _require_known(values: Mapping[str, object], where: PlaceOf) -> None:
    """Returns if all keys are those of a recipe, and none is missing that has no default."""
    for key in values:
        if key not in FIELD_PARSERS:
            raise unknown_setting(key, where(key))
    for key in _REQUIRED:
        if key not in values:
            raise RecipeError(
                f'expected the key "{key}", got only {", ".join(values) or "nothing"}',
                hint=f"add {key}: in the YAML file or --{key} on the command line",
                where=where(key),
                key=key,
            )


def _require_one_of_sizes(keys: Sequence[str]) -> None:
    """Returns if at most one of ranks, budget and target is given."""
    if len(keys) > 1:
        raise RecipeError(
            f"expected one of {', '.join(SIZES)}, got {' and '.join(keys)}",
            hint=f"leave {'one' if len(keys) == 2 else 'two'} out",
            key=keys[1],
        )


def _json_value(value: object) -> object:
    """Returns what JSON can hold, of which the field's parser makes the value again."""
    if isinstance(value, tuple):
        return [_json_value(item) for item in value]
    if isinstance(value, PrivateLoraTarget):
        return str(value)
    return str(value.absolute()) if isinstance(value, Path) else value
