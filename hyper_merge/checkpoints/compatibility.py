"""Checks that checkpoints can be merged: one family, the same keys and shapes, none given twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from hyper_merge.checkpoints.architectures.layout import Layout, Treatment
from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.fingerprint import fingerprint
from hyper_merge.checkpoints.io.gguf_file import rounding_error
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.errors import CheckpointError, MismatchError

_ADVICE: Final = "choose checkpoints of one family"
_MOST_NAMES: Final = 4  # of files that are alike, in one sentence
_UNCOMPARED: Final = (Treatment.COPY, Treatment.DROP)

Shapes = dict[str, tuple[int, ...]]


def check_compatible(headers: Sequence[Header], layouts: Sequence[Layout]) -> None:
    """Returns if all files are of one family and agree in every tensor that is averaged.

    What is copied or dropped (position ids, schedules, markers, idle weights, training averages)
    may differ.

    Args:
        headers: of all files; the others are compared with the first.
        layouts: of the same files.

    Raises:
        MismatchError: families are mixed; or a file lacks parts or keys, has more, or has other shapes.
    """
    check_families(headers, [layout.family for layout in layouts])
    _check_parts(headers, layouts)
    names = _names(headers)
    first = compared_shapes(headers[0], layouts[0])
    for header, layout, name in zip(headers[1:], layouts[1:], names[1:], strict=True):
        shapes = compared_shapes(header, layout)
        _require_keys(name, shapes, names[0], first)
        _require_shapes(name, shapes, names[0], first)


def check_families(headers: Sequence[Header], families: Sequence[Family]) -> None:
    """Returns if all files are of one family.

    Raises:
        MismatchError: they are not; names the files of every family, the largest group first.
    """
    titles = [family.title for family in families]
    _refuse_several(_names(headers), titles, ("is", "are"), _ADVICE)


def check_distinct(headers: Sequence[Header]) -> list[str]:
    """Returns a warning for each pair of files with the same content by `fingerprint`.

    Raises:
        MismatchError: one file is given twice, by its path or through a link.
        CheckpointError: a file cannot be read.
    """
    places: dict[tuple[int, int], Path] = {}
    for path in (header.path for header in headers):
        number = _file_number(path)
        if number in places:
            raise MismatchError(_twice(places[number], path))
        places[number] = path
    sizes = [header.size for header in headers]
    prints = [
        # Equal sizes only: most files need not be read at all.
        fingerprint(header) if sizes.count(header.size) > 1 else str(index)
        for index, header in enumerate(headers)
    ]
    groups: dict[str, list[str]] = {}
    for name, content in zip(_names(headers), prints, strict=True):
        groups.setdefault(content, []).append(name)
    return [f"{_join(names)} have the same content" for names in groups.values() if len(names) > 1]


def _join(names: Sequence[str]) -> str:
    """Returns the names as they stand in a sentence: the first of them, and how many more there are."""
    if len(names) > _MOST_NAMES:
        shown, last = names[: _MOST_NAMES - 1], f"{len(names) - _MOST_NAMES + 1} more"
    else:
        shown, last = names[:-1], names[-1]
    return f"{', '.join(shown)} and {last}"


def find_missing_parts(header: Header, layout: Layout) -> list[str]:
    """Returns a warning if a file that can be merged lacks a text encoder or the VAE."""
    texts = tuple(part.prefix for part in layout.family.parts if part.name == "text_encoder")
    needed = {"text encoder": texts, "VAE": layout.family.vae_prefixes}
    lacking = [f"no {title}" for title, keys in needed.items() if not _holds(header, keys)]
    if not lacking:
        return []
    return [f"the files hold {' and '.join(lacking)}: the hyper-model needs it from elsewhere"]


def find_differing_markers(headers: Sequence[Header]) -> list[str]:
    """Returns a warning for each file whose markers (such as ztsnr) are not those of the first."""
    names = _names(headers)
    first, *others = [
        {key for key, info in header.tensors.items() if not info.numel} for header in headers
    ]
    return [
        f"{name} and {names[0]} differ in {', '.join(sorted(marks ^ first))}; the hyper-model is"
        f" marked as {names[0]} is"
        for name, marks in zip(names[1:], others, strict=True)
        if marks != first
    ]


def find_quantised(headers: Sequence[Header]) -> list[str]:
    """Returns a warning for each quantised file, with what its rounding has lost, from samples.

    Raises:
        CheckpointError: a file cannot be read.
    """
    return [
        f"{name} is quantised ({', '.join(header.rounded_as)}): that has moved its weights by about"
        f" {_percent(rounding_error(header.path))} of their size, which no average takes back"
        for name, header in zip(_names(headers), headers, strict=True)
        if header.rounded_as
    ]


def _percent(fraction: float) -> str:
    """Returns a small share in percent with two digits.

    >>> _percent(0.00437), _percent(0.0713)
    ('0.44 %', '7.1 %')
    """
    return f"{100 * fraction:.2g} %"


def find_mixed_strains(headers: Sequence[Header], family: Family) -> list[str]:
    """Returns a warning if some names, not all, have a word for another training of the family.

    Nothing in such files tells them apart, and their average makes noise.
    """
    names = _names(headers)
    for word in family.strains:
        pattern = re.compile(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", re.IGNORECASE)
        found = [
            name
            for name, header in zip(names, headers, strict=True)
            if pattern.search(header.path.stem)
        ]
        if 0 < len(found) < len(names):
            others = ", ".join(name for name in names if name not in found)
            verb = "is" if len(found) == 1 else "are"
            warning = (
                f'{", ".join(found)} {verb} called "{word}", unlike {others}: {family.title} of both'
                " kinds have the same keys, but their average makes noise; merge them apart"
            )
            return [warning]
    return []


def _check_parts(headers: Sequence[Header], layouts: Sequence[Layout]) -> None:
    parts = [_parts(header, layout) for header, layout in zip(headers, layouts, strict=True)]
    _refuse_several(_names(headers), parts, ("holds", "hold"), "choose files with the same parts")


def _parts(header: Header, layout: Layout) -> str:
    """Returns the parts of a checkpoint that a file holds, for people."""
    prefixes: dict[str, tuple[str, ...]] = {
        part.title: (part.prefix,) for part in layout.family.parts
    }
    prefixes["VAE"] = layout.family.vae_prefixes
    titles = [title for title, keys in prefixes.items() if _holds(header, keys)]
    return " and ".join(filter(None, [", ".join(titles[:-1]), titles[-1]]))


def _holds(header: Header, prefixes: tuple[str, ...]) -> bool:
    return any(key.startswith(prefixes) for key in header.tensors)


def _refuse_several(
    names: Sequence[str], kinds: Sequence[str], verb: tuple[str, str], advice: str
) -> None:
    """Returns if all are of one kind; else counts and lists them, the largest group first."""
    groups: dict[str, list[str]] = {}
    for name, kind in zip(names, kinds, strict=True):
        groups.setdefault(kind, []).append(name)
    if len(groups) < 2:
        return
    falling = sorted(groups.items(), key=lambda group: -len(group[1]))
    counts = ", ".join(f"{len(files)} {verb[len(files) > 1]} {kind}" for kind, files in falling)
    listing = " / ".join(", ".join(files) for _, files in falling)
    raise MismatchError(f"{counts}: {listing}", hint=advice)


def _twice(first: Path, second: Path) -> str:
    if first == second:
        return f"{first} is given twice; choose every checkpoint once"
    return f"{first} and {second} are the same file; choose every checkpoint once"


def _file_number(path: Path) -> tuple[int, int]:
    """Returns what is equal for two paths to one file."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be compared with the others: {error}") from error
    return status.st_dev, status.st_ino


def _names(headers: Sequence[Header]) -> list[str]:
    """Returns the file names, with their folders where two are called the same."""
    names = [header.name for header in headers]
    return [str(header.path) if names.count(header.name) > 1 else header.name for header in headers]


def compared_shapes(header: Header, layout: Layout) -> Shapes:
    """Returns the tensors in which files that are merged must agree, with their shapes."""
    return {
        key: info.shape
        for key, info in header.tensors.items()
        if layout.treatments[key] not in _UNCOMPARED
    }


def _require_keys(name: str, shapes: Shapes, other: str, expected: Shapes) -> None:
    lacking = [key for key in expected if key not in shapes]
    if lacking:
        owner = other + ("'" if other.endswith("s") else "'s")
        raise MismatchError(
            f"{name} lacks {len(lacking)} of {owner} {len(expected)} keys (first: {lacking[0]})",
            hint=_ADVICE,
        )
    extra = [key for key in shapes if key not in expected]
    if extra:
        raise MismatchError(
            f"{name} has {_keys(extra)} that {other} lacks (first: {extra[0]})", hint=_ADVICE
        )


def _require_shapes(name: str, shapes: Shapes, other: str, expected: Shapes) -> None:
    differing = [key for key in expected if shapes[key] != expected[key]]
    if differing:
        key = differing[0]
        raise MismatchError(
            f"{name} and {other} differ in shape in {_keys(differing)} (first: {key}"
            f" {list(shapes[key])} against {list(expected[key])})",
            hint=_ADVICE,
        )


def _keys(keys: Sequence[str]) -> str:
    return f"{len(keys)} key" + ("s" if len(keys) > 1 else "")
