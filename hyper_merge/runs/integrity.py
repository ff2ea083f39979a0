"""Checks that the files of a run are still those that it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.hashes import tensor_data_sha256
from hyper_merge.errors import RunError
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import metadata_of, path_exists
from hyper_merge.runs.manifest import Run
from hyper_merge.runtime.progress import Progress, count


def require_family(run: Run) -> Family:
    """The run's architecture.

    Raises:
        RunError: this version does not know it.
    """
    if run.architecture is None:
        raise RunError(f"the run {run.name} is of the family {run.family}, unknown to this version")
    return run.architecture


def require_hyper_model(run: Run) -> Path:
    """The run's hyper-model.

    Raises:
        RunError: it is gone, or another file is in its place.
    """
    path = run.hyper_model
    if path not in run.missing:
        return path
    if not path_exists(path):
        raise RunError(
            f"{path}, the hyper-model of the run {run.name}, is missing",
            hint="bring it back from a copy, or merge the same checkpoints again",
        )
    raise RunError(
        f"{path} is not the hyper-model that the LoRAs of the run {run.name} go with: it was"
        " replaced by another file",
        hint="bring it back from a copy, or merge again",
    )


def require_own(run: Run, paths: Sequence[Path], progress: Progress) -> None:
    """Returns if LoRAs of a run are there, with the content that it wrote.

    Args:
        run: the run.
        paths: of its LoRAs, companions or top-ups.
        progress: progress and interrupt.

    Raises:
        RunError: some are missing, or one was edited or replaced.
    """
    advice = f"bring it back from a copy, or merge again into another name than {run.name}"
    missing = [path.name for path in paths if not path_exists(path)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise RunError(
            f"{', '.join(missing)} of the run {run.name} {verb} missing in {paths[0].parent}",
            hint=advice,
        )
    known = _hashes(run)
    counter = progress.counter("checking the LoRAs", {path: path.stat().st_size for path in paths})
    with counter:
        for path in paths:
            found = tensor_data_sha256(path, partial(count, counter, path))
            if found != known.get(path.stem, _recorded(path, run)):
                raise RunError(
                    f"{path.name} was edited or replaced since the run {run.name} wrote it",
                    hint=advice,
                )
            counter.finish(path)


def _hashes(run: Run) -> dict[str, str]:
    """Of the run's files and of the top-ups of its fits, by name."""
    fits, _ = load_fits(run)
    topups = {each.name: each.sha256 for fitted in fits for each in fitted.topups}
    return {**topups, **run.hashes}


def _recorded(path: Path, run: Run) -> str | None:
    """The hash that a LoRA itself records, if it is of this run; for manifests without hashes."""
    found = metadata_of(path)
    sources = all(source.sha256 in found.get("hyper_merge.lineage", "") for source in run.sources)
    is_own = sources and found.get("ss_output_name") == path.stem
    return found.get("sshs_model_hash") if is_own else None
