"""Formats the result of a restoration as plain text."""

from __future__ import annotations

from hyper_merge.operations.restore.restore import RestoreError, RestoreResult
from hyper_merge.runs.report_text import format_largest_losses
from hyper_merge.runtime.formatting import format_size


def format_restore(result: RestoreResult) -> str:
    """Returns lines about the restored file and its distance from the original."""
    mixture = " + ".join(f"{share:g} {name}" for name, share in result.shares.items())
    lines = [f"{result.path.stem}: {mixture}, of the run {result.run}"]
    rest = 1 - sum(result.shares.values())
    if abs(rest) > 1e-9:
        lines.append(
            f"note: the shares add up to {1 - rest:g}; as in prompts, the hyper-model has the rest"
            f" ({rest:g})"
        )
    if result.compared is not None:
        lines += _format_error(result.compared)
    else:
        lines.append(f"the error cannot be measured: {result.problem}")
    lines.append(
        f"VAE, embeddings and all else that LoRAs do not carry are those of {result.hyper_model}"
    )
    lines.append(f"checkpoint: {result.path} ({format_size(result.size)}, {result.dtype})")
    return "\n".join(lines)


def _format_error(error: RestoreError) -> list[str]:
    return [
        "measured against the original, of its differences from the hyper-model in weights:",
        f"  in the layers {error.explained:.2%} is restored (the report says {error.reported:.2%})",
        f"  in all tensors {error.everything:.2%}",
        f"  what remains, by section: {format_largest_losses(error.parts)}",
    ]
