"""Formats a report as plain text, for the terminal and for the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Final

from hyper_merge.loras.metadata import COMPANIONS
from hyper_merge.runs.report import (
    A1111,
    FORGE_AND_COMFYUI,
    CheckpointReport,
    EndLayers,
    PartLoss,
    Report,
    TrainingReport,
)
from hyper_merge.runtime.formatting import format_count, format_size
from hyper_merge.runtime.names import one_line

_WORST: Final = 3  # sections that are named
_METRICS: Final = {
    "output": "in what the network does, estimated by runs of the average",
    "layout": "in what the network does, estimated from its layout",
    "relative": "relative to the size of each layer",
    "plain": "in weights",
}
_MEASURED: Final = (
    "in what the network does, measured by runs of the checkpoints for random prompts"
)
_TURNS: Final = {A1111: "at every LoRA", FORGE_AND_COMFYUI: "once"}


def format_report(report: Report, *, of_loras: bool = False) -> str:
    """Returns the report as a table of plain text.

    Args:
        report: the report.
        of_loras: whether the inputs were LoRAs and not checkpoints.
    """
    names = [one_line(row.name) for row in report.checkpoints]
    noun = "LoRA" if of_loras else "checkpoint"
    width = max(map(len, [*names, noun]))
    lines = [
        f"{report.name}: {len(report.checkpoints)} {noun}s, {len(report.loras)} shared LoRAs",
        "",
        f"{noun:{width}}  explained  in weights    UNet  text enc.  rel. error"
        + ("" if of_loras else "   not carried"),
    ]
    lines += [
        f"{name:{width}}  {row.fidelity:9.2%}  {row.explained:10.2%} {row.explained_unet:7.2%} "
        f"{_format_text_encoder(report, row):>9}  {row.error:10.4f}"
        + ("" if of_loras else f"  {row.not_carried:12.3%}")
        for name, row in zip(names, report.checkpoints, strict=True)
    ]
    lines += [
        "",
        _format_explained(report, noun),
        "",
        *_format_training(report),
        *_format_losses(report, "none" if of_loras else "average alone"),
        *_format_rounding(report),
        *_format_details(report),
        *([] if of_loras else ["", *_format_not_carried(report)]),
        "",
        *_format_bytes(report, of_loras=of_loras),
    ]
    return "\n".join(lines) + "\n"


def format_groups(names: Sequence[str], groups: Sequence[Sequence[int]], between: float) -> str:
    """Returns a sentence about groups of unlike checkpoints, and the gain by one average for each.

    Args:
        names: of the checkpoints.
        groups: places of checkpoints.
        between: share of all differences that an average for each group takes away, 0..1.
    """
    words = " / ".join(", ".join(one_line(names[c]) for c in group) for group in groups)
    return (
        f"these checkpoints fall into {len(groups)} unlike groups: {words}; a merge for each group"
        f" would leave {1 - between:.0%} of the differences to its LoRAs"
    )


def format_largest_losses(parts: Sequence[PartLoss]) -> str:
    """Returns the sections of the network that lose most, with their shares; "nothing" for none."""
    worst = sorted(parts, key=lambda part: -part.lost)[:_WORST]
    return ", ".join(f"{part.name} {part.lost:.2%}" for part in worst if part.lost > 0) or "nothing"


def _format_text_encoder(report: Report, row: CheckpointReport) -> str:
    """Returns a share, or a dash where the files have no text encoder that takes LoRAs."""
    without = report.parts and all(part.which == "unet" for part in report.parts)
    return "-" if without else f"{row.explained_text_encoder:.2%}"


def _format_explained(report: Report, noun: str) -> str:
    weights = (
        f"{report.explained_mean:.2%} as the mean over {noun}s,"
        f" {min(row.explained for row in report.checkpoints):.2%} at worst;"
        f" {report.explained_of_all:.2%} of all differences by the shared LoRAs (1 - loss)"
    )
    if not report.shared_fidelity:
        return f"explained: {weights}"
    left, worst = 1 - report.fidelity_mean, 1 - report.worst.fidelity
    metric, before = _METRICS.get(report.metric, "with these weights"), ""
    if report.is_measured:
        metric, before = _MEASURED, _before_training(report.training)
    return (
        f"of 100 parts of difference {metric}, {100 * left:.1f} remain in the mean{before},"
        f" {100 * worst:.1f} at worst"
        f" ({one_line(report.worst.name)})\n"
        f"explained in weights: {weights}"
    )


def _format_training(report: Report) -> list[str]:
    training = report.training
    if training is None:
        return []
    if not training.has_gained:
        return ["the training gained nothing, so the LoRAs are those of the solve", ""]
    if report.is_measured:
        return []
    sentence = (
        f"without the private LoRAs: of 100 parts of difference {_MEASURED},"
        f" {100 * fmean(training.after):.1f} remain in the mean{_before_training(training)}"
    )
    return [sentence, ""]


def _before_training(training: TrainingReport | None) -> str:
    if training is None or not training.has_gained:
        return ""
    rounds = format_count(training.rounds, "round")
    return f" ({100 * fmean(training.before):.1f} before a training of {rounds})"


def _format_losses(report: Report, nothing: str) -> list[str]:
    has_any = report.loss or report.private_loss or report.weighted_private_loss
    steps = "blocks" if report.method == "greedy" else "sweeps"
    trail = " ".join(f"{loss:.4f}" for loss in report.losses)
    return [
        *_format_weighted_losses(report),
        "loss: what stays unexplained, as a share of all differences in the layers",
        _format_loss(nothing, 1.0 if has_any else 0.0),
        *_format_beside_limits(report.private_loss, report.loss, report.bound),
        f"  by {steps}, before rounding: {trail}",
    ]


def _format_weighted_losses(report: Report) -> list[str]:
    """Returns the losses as the merge counts them, by which it decides; none where all count alike."""
    if not report.weighted_loss or abs(report.weighted_loss - report.loss) < 1e-12:
        return []
    known = report.weighted_private_loss or report.weighted_bound
    limits = (report.weighted_private_loss, report.weighted_bound) if known else (None, None)
    return [
        f"weighted loss: what stays unexplained, layers weighed by {report.metric}",
        *_format_beside_limits(limits[0], report.weighted_loss, limits[1]),
    ]


def _format_beside_limits(
    private_loss: float | None, loss: float, bound: float | None
) -> list[str]:
    """Returns a loss beside what is known of private LoRAs' and of the bound."""
    over_bound = f"   {loss / bound:.2f} times the bound" if bound else ""
    lines = [_format_loss("shared LoRAs, as written", loss) + over_bound]
    if private_loss is not None:
        lines.insert(0, _format_loss("private LoRAs of the same bytes", private_loss))
    if bound is not None:
        lines.append(_format_loss("lower bound", bound))
    return lines


def _format_loss(name: str, value: float) -> str:
    return f"  {name:33} {value:.4f}"


def _format_rounding(report: Report) -> list[str]:
    """Returns the loss that hosts add by rounding, and advice where it is large."""
    if not report.rounding:
        return []
    lines = ["", "added to that by rounding, where a program holds the weights in half precision"]
    for loss in report.rounding:
        hosts = ", ".join(filter(None, (loss.hosts, _TURNS.get(loss.hosts))))
        lines.append(f"  {hosts:36} {loss.added:.2e}   worst {loss.worst:.2e}")
    if report.costly_rounding:
        lines.append(f"  one LoRA per checkpoint is rounded once: hyper-merge export {report.name}")
    return lines


def _format_details(report: Report) -> list[str]:
    """Returns lines about the first LoRAs alone, unlike groups, and where most is lost."""
    lines = []
    if report.groups:
        names = [row.name for row in report.checkpoints]
        lines += ["", format_groups(names, report.groups, report.between_groups)]
    if report.curve:
        means = " ".join(f"{sum(row) / len(row):7.2%}" for row in report.curve[1:])
        worst = " ".join(f"{min(row):7.2%}" for row in report.curve[1:])
        lines += ["", "explained by the first LoRAs: 1, 2, ..."]
        lines += [f"  mean  {means}", f"  worst {worst}"]
    if report.parts and report.loss > 0:
        most = sorted(report.parts, key=lambda part: part.lost, reverse=True)[:_WORST]
        shares = ", ".join(f"{part.name} {part.lost / report.loss:.1%}" for part in most)
        lines += ["", f"sections with the most of the loss: {shares}"]
    return lines


def _format_not_carried(report: Report) -> list[str]:
    shares = ", ".join(f"{kind} {share:.3%}" for kind, share in report.not_carried.items())
    lines = [f"not carried by LoRAs, as a share of all differences: {shares}"]
    if report.ends:
        lines.append(_format_ends(report, report.ends))
    if report.recovered:
        kinds = [gain.kind for gain in report.recovered]
        where = COMPANIONS["all" if "biases" in kinds else "norms"][1]
        gains = ", ".join(f"{gain.kind} {gain.share:.2%}" for gain in report.recovered)
        lines.append(f"restored by the companions, in the UNet: {gains}; they load in {where}")
    return lines


def _format_ends(report: Report, ends: EndLayers) -> str:
    """Returns a sentence about the layers at the ends of the network, which LoRAs leave averaged."""
    part = f"end layers hold {ends.share:.2%} of the differences in layers, as the loss weighs them"
    if not ends.carried:
        return f"{part}, and are averaged only (exact ends would carry them)"
    if not report.companions:
        return f"{part}, too little for a companion"
    return f"{part}, and are carried by the companions"


def _format_bytes(report: Report, *, of_loras: bool) -> list[str]:
    if of_loras:
        before, after = format_size(report.bytes_before), format_size(report.bytes_loras)
        part = report.bytes_loras / report.bytes_before
        return [f"{before} of LoRAs -> {after}, {part:.1%} of their bytes"]
    average, loras = report.bytes_average, report.bytes_loras
    after = format_size(average + loras)
    parts = f"hyper-model {format_size(average)} + LoRAs {format_size(loras)}"
    return [f"{format_size(report.bytes_before)} of checkpoints -> {parts} = {after}"]
