"""Checks that the files of a run are still those that it wrote."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.hashes import tensor_data_sha256
from hyper_merge.errors import RunError
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import metadata_of
from hyper_merge.runs.paths import path_exists
from hyper_merge.runs.run import Run
from hyper_merge.runtime.progress import Progress


def require_family(run: Run) -> Family:
    """Returns the run's architecture.

    Raises:
        RunError: this version does not know it.
    """
    if run.architecture is None:
        raise RunError(f"the run {run.name} is of the family {run.family}, unknown to this version")
    return run.architecture


def require_hyper_model(run: Run) -> Path:
    """Returns the path of the run's hyper-model.

    Raises:
        RunError: it is gone, or another file is in its place.
    """
    path = run.hyper_model
    if path not in run.missing:
        return path
    if not path_exists(path):
        raise RunError(
            f"{path}, the hyper-model of the run {run.name}, is missing",
            hint="copy it back from a backup, or merge the same checkpoints again",
        )
    raise RunError(
        f"{path} is not the hyper-model that the LoRAs of the run {run.name} go with: it was"
        " replaced by another file",
        hint="copy it back from a backup, or merge again",
    )


def require_own(run: Run, paths: Sequence[Path], progress: Progress) -> None:
    """Returns if LoRAs of a run exist with the content that the run wrote.

    Args:
        run: the run.
        paths: of its LoRAs, companions or private LoRAs.
        progress: progress and interrupt.

    Raises:
        RunError: some are missing, or one was edited or replaced.
    """
    advice = f"copy it back from a backup, or merge again into another name than {run.name}"
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
            digest = tensor_data_sha256(path, partial(counter.advance, path))
            if digest != known.get(path.stem, _recorded_hash(path, run)):
                raise RunError(
                    f"{path.name} was edited or replaced since the run {run.name} wrote it",
                    hint=advice,
                )
            counter.finish(path)


def _hashes(run: Run) -> dict[str, str]:
    """Returns the hashes of the run's LoRAs and of the private LoRAs of its fits, by name."""
    fits, _ = load_fits(run)
    private = {lora.name: lora.sha256 for record in fits for lora in record.topups}
    return {**private, **run.hashes}


def _recorded_hash(path: Path, run: Run) -> str | None:
    """Returns the hash in a LoRA's metadata if it is of this run; for manifests without hashes."""
    metadata = metadata_of(path)
    lineage = metadata.get("hyper_merge.lineage", "")
    of_run = all(source.sha256 in lineage for source in run.sources)
    is_own = of_run and metadata.get("ss_output_name") == path.stem
    return metadata.get("sshs_model_hash") if is_own else None
