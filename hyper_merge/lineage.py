"""Hashes of the source files, which hosts know checkpoints by; remembered, for they take a while."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import torch

from hyper_merge.checkpoints.hashes import file_sha256, legacy_hash
from hyper_merge.checkpoints.header import Header
from hyper_merge.checkpoints.outputs import Outputs
from hyper_merge.control import Control
from hyper_merge.lora import Lineage, Source
from hyper_merge.preflight import Preflight
from hyper_merge.workers import workers

_FILE: Final = "hashes.json"


def lineage_of(preflight: Preflight, cache: Path, control: Control) -> Lineage:
    """Names and hashes of all sources; hashes of unchanged files come from the cache folder."""
    known = _known(cache / _FILE)
    headers = preflight.sources.read
    new = [header for header in headers if _key(header) not in known]

    def sha256(header: Header) -> str:
        return file_sha256(header.path, control.should_stop)

    with workers(torch.device("cpu")) as each:
        for done, (header, digest) in enumerate(zip(new, each(sha256, new), strict=True)):
            known[_key(header)] = digest
            control.step("hashing the checkpoints", (done + 1) / len(new))
    if new:
        with Outputs(overwrite=True) as outputs:
            outputs.text(cache / _FILE, json.dumps(known, indent=1))
    recipe = preflight.recipe
    return Lineage(
        name=recipe.name,
        family=preflight.sources.layout.family,
        recipe=recipe.to_metadata(),
        sources=tuple(_source(header, known[_key(header)]) for header in headers),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _source(header: Header, sha256: str) -> Source:
    return Source(header.name, sha256, legacy_hash(header.path), header.metadata)


def _key(header: Header) -> str:
    return f"{header.path.resolve()}|{header.size}|{header.mtime_ns}"


def _known(path: Path) -> dict[str, str]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
