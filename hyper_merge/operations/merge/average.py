"""Writes the hyper-model, the average of the checkpoints, during the pass over them."""

from __future__ import annotations

from pathlib import Path

from hyper_merge.analysis.streaming_pass import PassOptions, stream_layers
from hyper_merge.checkpoints.io.safetensors_writer import SafetensorsWriter
from hyper_merge.checkpoints.io.transaction import FileTransaction, require_free
from hyper_merge.checkpoints.prediction_type import find_config_file, v_prediction_config
from hyper_merge.errors import RecipeError
from hyper_merge.loras.metadata import Lineage, checkpoint_metadata
from hyper_merge.operations.merge.cost_model import average_costs
from hyper_merge.operations.merge.estimate import average_bytes
from hyper_merge.operations.merge.lineage import make_lineage
from hyper_merge.operations.merge.preflight import Preflight
from hyper_merge.recipe.recipe import AVERAGE
from hyper_merge.runs.folders import AVERAGE_ID, require_no_source
from hyper_merge.runs.name_locks import Hold, held
from hyper_merge.runtime.devices import device_job, resolve_device
from hyper_merge.runtime.disks import require_disks
from hyper_merge.runtime.progress import Progress


def run_average(preflight: Preflight, progress: Progress) -> Path:
    """Writes the hyper-model alone, and returns its path.

    Args:
        preflight: the validated recipe.
        progress: progress and interrupt.

    Raises:
        HyperMergeError: refused input, a full disk, or the user's interrupt.
    """
    recipe, folders = preflight.recipe, preflight.folders
    path = folders.models / f"{recipe.name}.safetensors"
    if recipe.base != AVERAGE:
        raise RecipeError(f"the average has no use for the base {recipe.base}", hint="leave it out")
    with held(folders.runs, Hold("merge", recipe.name), Hold("model", path.name)):
        return _write_average(preflight, path, progress)


def _write_average(preflight: Preflight, path: Path, progress: Progress) -> Path:
    """Writes the hyper-model to a path whose name is held."""
    recipe, inputs, folders = preflight.recipe, preflight.inputs, preflight.folders
    require_no_source(path, recipe.models)
    require_free(path, overwrite=recipe.overwrite)
    folders.require_unused(path, preflight.average_id)
    require_disks({folders.models: average_bytes(inputs)})
    options = PassOptions(resolve_device(recipe.device), recipe.seed)
    hashing, reading = progress.split(average_costs(inputs, folders.cache))
    with FileTransaction(overwrite=recipe.overwrite) as transaction:
        lineage = make_lineage(preflight, recipe.name, hashing)
        with (
            device_job(options.device),
            average_writer(transaction, path, preflight, lineage) as writer,
        ):
            stream_layers(inputs, options, writer.write, None, reading)
    return path


def average_writer(
    transaction: FileTransaction, path: Path, preflight: Preflight, lineage: Lineage
) -> SafetensorsWriter:
    """Stages the hyper-model, with the configuration file that some hosts need next to it.

    Returns:
        The writer of its tensors, to be used as a context manager.

    Raises:
        OutputError: the place is taken.
    """
    metadata = {**checkpoint_metadata(lineage), AVERAGE_ID: preflight.average_id}
    config = v_prediction_config(preflight.inputs.headers[0], preflight.inputs.layout.family)
    config_file = find_config_file(path)
    if config is not None:
        transaction.text(config_file, config)
    elif preflight.recipe.overwrite and config_file.exists():
        transaction.remove(config_file)  # it belongs to the file that is replaced
    return transaction.safetensors(path, preflight.inputs.outputs(), metadata)
