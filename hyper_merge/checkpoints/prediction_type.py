"""Finds out whether a checkpoint predicts noise or v, which its keys and shapes do not always show.

Hosts know a checkpoint that predicts v by the configuration (`.yaml`) beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import yaml

from hyper_merge.checkpoints.architectures.spec import Family
from hyper_merge.checkpoints.io.header import Header
from hyper_merge.checkpoints.reader import CheckpointReader

_MARK: Final = "v_pred"  # an empty tensor
_LARGEST_FILE: Final = 1 << 18  # bytes; more takes yaml seconds, and configurations are of few KB
# What yaml's constructors raise for words that only look like dates and numbers, and for deep nesting.
_DAMAGES: Final = (
    *(ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError),
)
_SPREAD: Final = 0.09  # standard deviation; hosts ask the same tensor and number


def with_prediction_type(header: Header, family: Family) -> Family:
    """Returns the family, or its variant that predicts v where the file does.

    It decides by the .yaml beside the file, as hosts do; then by a marker among the keys; by the
    file's metadata; and for SD 2 by the spread of one short tensor, the only one that is read.

    Raises:
        CheckpointError: the file cannot be read.
    """
    return family.predicting_v() if family.v_metadata and _predicts_v(header, family) else family


def find_config_file(path: Path) -> Path:
    """Returns the path at which hosts look for a checkpoint's configuration."""
    return path.with_suffix(".yaml")


def v_prediction_config(first: Header, family: Family) -> str | None:
    """Returns the text of the configuration beside an average that predicts v; None for any other.

    An average may look like the other kind by the spread of its values, and A1111 does not know
    the marker of SDXL.

    Args:
        first: the first of the checkpoints; its configuration is copied where it has one.
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
    declared = header.metadata.get("modelspec.prediction_type")
    if config is not None:
        return _declares_v(config)
    if _MARK in header.tensors or declared:
        return _MARK in header.tensors or declared == "v"
    return family.v_spread in header.tensors and _is_wide(header, family.v_spread)


def _config(path: Path) -> dict[str, Any] | None:
    """Returns the parameters in a host's configuration; None if there is none that can be read."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return None
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = config["model"]["params"]
    except (OSError, yaml.YAMLError, *_DAMAGES):
        return None  # the file is the host's, which will complain of it
    return params if isinstance(params, dict) else None


def _declares_v(params: dict[str, Any]) -> bool:
    """Tells whether a configuration is of v-prediction, as Forge and A1111 read its two forms."""
    if params.get("parameterization") == "v":
        return True
    value: Any = params
    for key in ("denoiser_config", "params", "scaling_config", "target"):
        value = value.get(key) if isinstance(value, dict) else None
    return isinstance(value, str) and value.endswith(".VScaling")


def _is_wide(header: Header, key: str) -> bool:
    with CheckpointReader(header.path, expected=header) as checkpoint:
        return float(checkpoint.tensor(key).float().std()) > _SPREAD
