"""Damage done to plain data, and the texts of JSON and YAML that hold it."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from random import Random
from typing import Any, Final

from mutations import VALUES, changed, places, removed

from hyper_merge.runtime.checked_json import sealed

TEXTS: Final = (
    *("\ud800", "\0", "../../../x", "/", "a\nb", "é" * 300, "<b>", "|", "\\", "-1", "1e400", "{}"),
    *("2024-99-99", "9999-12-31T23:59:59+14:00", "2024-01-01T00:00:00+00:00", "%s%n{0}", "\u202e"),
    *("{" + "x" * 70_000, "nan", "Infinity", "[" * 5000, "None", "CON", "x" * 300, "\ufeff", " "),
)
NUMBERS: Final = (
    *(0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**19, 10**400, -(10**400)),
    *(1e308, -1e308, 5e-324, -0.0, 1e16, 0.5, float("nan"), float("inf"), float("-inf")),
)
_NESTED: Final = "@nested@"  # stands for what is too deep for `json.dumps`
_DEPTHS: Final = (40, 900, 3000, 100_000)

Change = Callable[[Any, Random], Any]


def hostile_value(random: Random) -> Any:
    """Returns a value that belongs nowhere."""
    kind = random.randrange(6)
    if kind == 0:
        return random.choice(NUMBERS)
    if kind == 1:
        return random.choice(TEXTS)
    if kind == 2:
        return _NESTED
    if kind == 3:
        return [hostile_value(random)] * random.choice((1, 2, 3, 100))
    if kind == 4:
        return {random.choice(TEXTS): hostile_value(random)}
    return random.choice(VALUES)


def damaged(value: Any, random: Random) -> Any:
    """Returns plain data with one to three damages."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = random.choice(_CHANGES)(value, random)
    return value


def as_text(value: Any, random: Random) -> str:
    """Returns the JSON of damaged data; nesting is made here, and sometimes a key stands twice."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.8)
    depth = random.choice(_DEPTHS)
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    text = text.replace(f'"{_NESTED}"', opening * depth + "0" + closing * depth, 1)
    text = text.replace(f'"{_NESTED}"', "[[[0]]]")
    if random.random() < 0.05 and '": ' in text:
        place = random.choice([i for i in range(len(text)) if text.startswith('": ', i)])
        key = text[text.rfind('"', 0, place) : place + 3]
        text = text[: place - len(key) + 3] + f"{key}null, " + text[place - len(key) + 3 :]
    return text


def damaged_json(sample: bytes, random: Random) -> bytes:
    """Returns the bytes of a JSON file with damaged data."""
    return as_text(damaged(json.loads(sample), random), random).encode("utf-8", "surrogatepass")


def damaged_sealed(sample: bytes, random: Random) -> bytes:
    """Returns a file with a checksum, which mostly fits the damaged data."""
    if random.random() < 0.2:
        return damaged_json(sample, random)
    content = damaged(json.loads(sample)["content"], random)
    text = as_text(content, random)
    try:
        return sealed(json.loads(text)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):  # nothing that could be sealed
        return text.encode("utf-8", "surrogatepass")


def damaged_yaml(sample: bytes, random: Random) -> bytes:
    """Returns lines of YAML with some replaced, taken away, or given twice."""
    lines = sample.decode().splitlines()
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(len(lines) + 1)
        line = lines[place] if place < len(lines) else "new: 1"
        key = line.partition(":")[0]
        value = random.choice((*_YAML, *TEXTS, *map(str, NUMBERS), *map(json.dumps, VALUES[:15])))
        options = [f"{key}: {value}", f"{key}: [{value}]", f"{key}:\n- {value}", f"{value}: 1"]
        options += [f"{line}\n{line}", f"? {value}\n: {line.strip()}", "\t" + line, "---", value]
        lines[place : place + 1] = [random.choice(options)]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_YAML: Final = (
    *("!!python/object/apply:os.system [x]", "!!binary x", "&a [*a, *a]", "*a", "!!timestamp x"),
    *("2001-12-14t21:59:43.10-99999999999:00", "1:2:3:4:5:6:7:8", "0x" + "f" * 9999, "9" * 9999),
    *(
        "<<: *a",
        "!<tag:yaml.org,2002:int> x",
        "{<<: [1]}",
        "%YAML 9.9",
        "@",
        "`",
        "'",
        '"\\x',
        "|9",
    ),
    *(
        "[" * 2000,
        "{a: " * 2000,
        "- " * 2000,
        "? " * 2000,
        "[a, " * 500,
        "!!set {a, a}",
        "0o9",
        "~",
    ),
    *(
        '"\\UFFFFFFFF"',
        '"\\ud800"',
        "%YAML " + "9" * 5000,
        '"\\udc80/x"',
        '["\\ud83d"]',
        "- [a, b]",
    ),
    *(".nan", ".inf", "2001-01-32", "0b2", "=", "&a" * 300, "#" * 9999, "!!omap [1]", "\x85"),
)


def _replace(value: Any, random: Random) -> Any:
    return changed(value, _place(value, random), hostile_value(random))


def _scale(value: Any, random: Random) -> Any:
    numbers = [at for at in places(value) if type(_at(value, at)) in (int, float)]
    if not numbers:
        return _replace(value, random)
    return changed(value, random.choice(numbers), random.choice(NUMBERS))


def _retext(value: Any, random: Random) -> Any:
    texts = [at for at in places(value) if isinstance(_at(value, at), str)]
    if not texts:
        return _replace(value, random)
    at = random.choice(texts)
    return changed(value, at, _damaged_text(_at(value, at), random))


def _damaged_text(text: str, random: Random) -> str:
    place = random.randrange(len(text) + 1)
    new = random.choice((random.choice(TEXTS), random.choice(string.printable), ""))
    return text[:place] + new + text[place + random.randrange(4) :]


def _remove(value: Any, random: Random) -> Any:
    at = _place(value, random)
    return removed(value, at) if at else hostile_value(random)


def _add(value: Any, random: Random) -> Any:
    at = random.choice([at for at in places(value) if isinstance(_at(value, at), dict)] or [()])
    known = _at(value, at)
    added = {random.choice(TEXTS): hostile_value(random)}
    return changed(value, at, {**known, **added} if isinstance(known, dict) else added)


def _swap(value: Any, random: Random) -> Any:
    one, other = _place(value, random), _place(value, random)
    if one[: len(other)] == other or other[: len(one)] == one:
        return changed(value, one, [_at(value, one)])
    first = _at(value, one)
    return changed(changed(value, one, _at(value, other)), other, first)


def _lengthen(value: Any, random: Random) -> Any:
    lists = [at for at in places(value) if isinstance(_at(value, at), list)]
    if not lists:
        return _replace(value, random)
    at = random.choice(lists)
    items = _at(value, at)
    longer = [*(items * random.choice((2, 1000)))[:3000], hostile_value(random)]
    return changed(value, at, random.choice((items[:-1], items[::-1], longer)))


_CHANGES: Final[tuple[Change, ...]] = (
    *(_replace, _replace, _scale, _scale, _retext, _remove, _add, _swap, _lengthen),
)


def _place(value: Any, random: Random) -> tuple[str | int, ...]:
    return random.choice(list(places(value)))


def _at(value: Any, at: tuple[str | int, ...]) -> Any:
    for key in at:
        value = value[key]
    return value
