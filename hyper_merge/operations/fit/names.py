"""Finds free names for a fit's record and private LoRA, and the files of an earlier fit of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.errors import NameTakenError, OutputError
from hyper_merge.operations.fit.request import FitRequest, PreparedFit
from hyper_merge.runs.fit_records import PrivateLoraRecord, fit_record_paths, require_own_record
from hyper_merge.runs.folders import Folders, require_no_source
from hyper_merge.runtime.names import LONGEST_WORD, name_key, prompt_word, unique_name


def with_free_names(fit: PreparedFit, request: FitRequest, folders: Folders) -> PreparedFit:
    """Returns the fit with the name of its private LoRA, if its files replace only what they may.

    Raises:
        OutputError: a name is taken, the folder of the fits is a link, or the fit would replace the
            file that it reads.
    """
    paths = fit_record_paths(fit.run, fit.name)
    if paths[0].parent.is_symlink():
        raise OutputError(
            f"{paths[0].parent} is a link, and links are not followed",
            hint="put the folder itself there, or remove the link",
        )
    require_own_record(fit.run, fit.name)
    for path in paths:
        require_free(path, overwrite=request.overwrite)
    if request.overwrite:
        for path in folders.fit_files_of(fit.run.name, fit.name):
            require_no_source(path, [request.checkpoint])
    return replace(fit, topup_stem=_topup_stem(fit, folders, overwrite=request.overwrite))


def _topup_stem(fit: PreparedFit, folders: Folders, *, overwrite: bool) -> str:
    """Returns the private LoRA's name without the rank, which no other fit of the run has.

    Raises:
        NameTakenError: a file of that name exists that belongs to no fit.
    """
    of_others = folders.fitted_names(fit.run.name, but=fit.name)
    taken = {name_key(name.rpartition("-")[0]) for name in of_others}
    word = prompt_word(fit.name, LONGEST_WORD)
    stem = unique_name(f"{fit.run.name}_fit-{word}", lambda name: name_key(name) in taken)
    replaced = folders.fit_files_of(fit.run.name, fit.name) if overwrite else []
    for path in sorted(folders.loras.glob("*.safetensors")):
        name, _, rank = path.stem.rpartition("-")
        if name_key(name) == name_key(stem) and rank.isdecimal() and path not in replaced:
            raise NameTakenError(
                f"{path} exists already",
                hint=f"allow overwriting if it belongs to an earlier fit of {fit.name}, or choose"
                " another name for this one",
            )
    return stem


def remove_earlier(
    outputs: FileTransaction,
    fit: PreparedFit,
    folders: Folders,
    topups: Sequence[PrivateLoraRecord],
) -> None:
    """Removes the files of an earlier fit of this name that are not replaced."""
    records = {path.stem for path in fit_record_paths(fit.run, fit.name)}
    written = {name_key(name) for name in (*records, *(lora.name for lora in topups))}
    for path in folders.fit_files_of(fit.run.name, fit.name):
        if name_key(path.stem) not in written:
            outputs.remove(path)
