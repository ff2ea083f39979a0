"""Whether a checkpoint predicts noise or v, which keys and shapes alone do not always tell.

And the configuration (`.yaml`) beside a checkpoint of the second kind, by which hosts know it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader

_MARK: Final = "v_pred"  # an empty tensor
_SPREAD: Final = 0.09  # standard deviation; hosts ask the same tensor and number


def with_prediction_type(header: Header, family: Family) -> Family:
    """The family, or its variant that predicts v if the file is of that.

    By the .yaml beside the file, as hosts have it; by a marker among the keys; by the file's
    metadata; and for SD 2 by the spread of one short tensor, the only one that is read.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return family.predicting_v() if family.v_words and _predicts_v(header, family) else family


def find_config_file(path: Path) -> Path:
    """Where hosts look for a checkpoint's own configuration."""
    return path.with_suffix(".yaml")


def v_prediction_config(first: Header, family: Family) -> str | None:
    """What is to stand beside an average that predicts v; None for any other.

    An average may look like the other kind by the spread of its values, and A1111 does not know
    the marker of SDXL.

    Args:
        first: the first of the checkpoints; its own configuration is taken over.
        family: of all of them, as `with_prediction_type` gives it.
    """
    if not family.predicts_v:
        return None
    path = find_config_file(first.path)
    if _config(path) is not None:
        return path.read_text(encoding="utf-8")
    return family.v_configuration and yaml.safe_dump(family.v_configuration(), sort_keys=False)


def _predicts_v(header: Header, family: Family) -> bool:
    config = _config(find_config_file(header.path))
    said = header.metadata.get("modelspec.prediction_type")
    if config is not None:
        return _says_v(config)
    if _MARK in header.tensors or said:
        return _MARK in header.tensors or said == "v"
    return family.v_spread in header.tensors and _is_wide(header, family.v_spread)


def _config(path: Path) -> dict[str, Any] | None:
    """The parameters in a host's configuration; None if there is none that can be read."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = config["model"]["params"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None  # the file is the host's; it will tell its own
    return params if isinstance(params, dict) else None


def _says_v(params: dict[str, Any]) -> bool:
    """Forge and A1111 read the two kinds of configuration so."""
    if params.get("parameterization") == "v":
        return True
    found: Any = params
    for key in ("denoiser_config", "params", "scaling_config", "target"):
        found = found.get(key) if isinstance(found, dict) else None
    return isinstance(found, str) and found.endswith(".VScaling")


def _is_wide(header: Header, key: str) -> bool:
    with CheckpointReader(header.path, expected=header) as checkpoint:
        return float(checkpoint.tensor(key).float().std()) > _SPREAD
