"""YAML files of settings, read with the line of each; what they mean is not known here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from hyper_merge.errors import RecipeError
from hyper_merge.recipe.plain_values import describe_value, plain_value

LARGEST_FILE = 1 << 18  # bytes; more takes yaml seconds, and no recipe comes near


@dataclass(frozen=True)
class Setting:
    """A value as the user wrote it, and its place for messages."""

    value: object
    where: str


def read_settings(path: Path) -> dict[str, Setting]:
    """Returns the settings of a YAML file by key.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping of unique words.
    """
    with _about(path):
        return _settings(_compose(_read(path), path), path)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Names the file in every refusal within the block."""
    try:
        yield
    except RecipeError as error:
        error.file, error.where = path, error.where or str(path)
        raise


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise RecipeError(
                f"expected a YAML recipe, got {size} bytes",
                hint='give checkpoints under "models" in a YAML file or after --models',
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}", hint="check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"expected text in UTF-8, got the byte 0x{error.object[error.start]:02x} at position"
            f" {error.start}",
            hint="save the file as UTF-8",
        ) from error


def _compose(text: str, path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        is_escape = "escape" in problem
        hint = "write Windows paths without quotes, or between single ones" if is_escape else ""
        raise RecipeError(
            f"not valid YAML: {problem}", hint=hint, where=f"{path}{place}"
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"not valid YAML: {error.reason} (character code {ord(text[error.position])})",
            where=f"{path}, line {line}",
        ) from error
    except RecursionError:
        raise RecipeError("not a recipe: brackets nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a number of yaml's own beyond all measure
        raise RecipeError(f"not valid YAML: {error}") from error


def _settings(root: yaml.Node | None, path: Path) -> dict[str, Setting]:
    if not isinstance(root, yaml.MappingNode):
        place = "" if root is None else f", line {root.start_mark.line + 1}"
        contents = "an empty file" if root is None else describe_value(_value(root))
        raise RecipeError(
            f'expected lines of the form "key: value", got {contents}',
            hint="start with name: and models:",
            where=f"{path}{place}",
        )
    settings: dict[str, Setting] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(
                f"expected a word as key, got {describe_value(_value(key_node))}",
                where=f"{path}, line {line}",
            )
        key = key_node.value
        where = f'{path}, line {line}, key "{key}"'
        if key in settings:
            raise RecipeError(
                f"given twice, first in line {lines[key]}", hint="keep one", where=where, key=key
            )
        settings[key] = Setting(_value(value_node), where)
        lines[key] = line
    return settings


def _value(node: yaml.Node) -> object:
    """Returns plain words by the rules of `plain_value`, quoted ones as text, lists one level deep."""
    if isinstance(node, yaml.ScalarNode):
        return plain_value(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) if isinstance(item, yaml.ScalarNode) else [] for item in node.value]
    return {}
