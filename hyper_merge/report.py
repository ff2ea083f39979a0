"""What a merge achieved: losses of the written files by checkpoint and part, baselines, bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from hyper_merge.analysis_cache import Analysis
from hyper_merge.decomposition.bounds import lower_bound, private_losses
from hyper_merge.decomposition.contrasts import distances, energies
from hyper_merge.decomposition.ll1 import Statistics, fit_multipliers
from hyper_merge.solution import Rounded

PARTS: Final = {"unet": "UNet", "text_encoder": "text encoder"}


@dataclass(frozen=True, eq=False)
class Fit:
    """Multipliers for blocks as written, and what they leave unexplained."""

    multipliers: Tensor  # (k, R), float64
    errors: Tensor  # (layers, k), float64: squared norms of what is left
    energies: Tensor  # (layers, k), float64: squared norms of the deviations

    @property
    def loss(self) -> float:
        """Fraction of all deviations' energy that is not explained; 0 where there is none."""
        return _share(self.errors.sum(), self.energies.sum())

    def explained(self, layers: Tensor | None = None) -> Tensor:  # (k,)
        """Explained share by checkpoint, in chosen layers (a mask) or in all."""
        errors, of = (
            part if layers is None else part[layers] for part in (self.errors, self.energies)
        )
        left = torch.stack(
            [torch.tensor(_share(e, o)) for e, o in zip(errors.sum(0), of.sum(0), strict=True)]
        )
        return 1 - left


def fit(analysis: Analysis, blocks: Rounded) -> Fit:
    """The best multipliers for the blocks as they are written, and the exact loss with them."""
    of = energies(analysis.grams, analysis.contrasts)
    cross = distances(analysis.contrasts) @ blocks.cross  # (layers, k, R)
    total = Statistics(float(of.sum()), cross.sum(0), blocks.gram.sum(0))
    multipliers = fit_multipliers(total)
    explained = 2 * (cross * multipliers).sum(2)
    squares = torch.einsum("kr,lrs,ks->lk", multipliers, blocks.gram, multipliers)
    return Fit(multipliers, (of - explained + squares).clamp(min=0), of)


@dataclass(frozen=True)
class CheckpointReport:
    """One checkpoint's lines."""

    name: str
    explained: float  # share of its deviation, 0..1
    explained_unet: float
    explained_text_encoder: float
    error: float  # norm of what is left, as a fraction of the deviation's norm
    not_carried: float  # share of its whole deviation that lies in tensors that no LoRA carries
    multipliers: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """All figures of a merge; fractions are of squared norms ("energy")."""

    name: str
    loras: tuple[str, ...]  # names in prompts
    checkpoints: tuple[CheckpointReport, ...]
    method: str
    losses: tuple[float, ...]  # after each sweep, before rounding
    loss: float  # of the written files
    private_loss: float  # of private LoRAs of the same bytes
    bound: float  # no LoRAs of these ranks go below
    not_carried: Mapping[str, float]  # kind -> share of all deviations, layers included
    bytes_before: int
    bytes_average: int
    bytes_loras: int

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        rows = [dict(vars(row), multipliers=list(row.multipliers)) for row in self.checkpoints]
        return dict(vars(self), checkpoints=rows, not_carried=dict(self.not_carried))


@dataclass(frozen=True)
class Sizes:
    """Bytes of files."""

    before: int
    average: int
    loras: int


def make_report(
    analysis: Analysis,
    found: Fit,
    ranks: Sequence[tuple[int, ...]],
    names: tuple[str, Sequence[str], Sequence[str]],  # of the run, its LoRAs, the checkpoints
    solved: tuple[str, Sequence[float]],  # method, losses by sweep
    sizes: Sizes,
) -> Report:
    """Gathers all figures of a merge."""
    gram = analysis.grams[:, :-1, :-1].sum(0)
    spectra = analysis.spectra
    total = float(found.energies.sum())
    private = private_losses(spectra, found.energies, ranks)
    bound = lower_bound(spectra, found.energies.sum(1).tolist(), ranks, gram)
    outside = analysis.not_carried
    everything = total + float(sum(part.sum() for part in outside.values()))
    return Report(
        name=names[0],
        loras=tuple(names[1]),
        checkpoints=_rows(analysis, found, names[2]),
        method=solved[0],
        losses=tuple(solved[1]),
        loss=found.loss,
        private_loss=_share(private.sum(), total),
        bound=bound,
        not_carried={kind: _share(part.sum(), everything) for kind, part in outside.items()},
        bytes_before=sizes.before,
        bytes_average=sizes.average,
        bytes_loras=sizes.loras,
    )


def text(report: Report) -> str:
    """The report as a table of plain text."""
    width = max([len(row.name) for row in report.checkpoints] + [len("checkpoint")])
    lines = [
        f"{report.name}: {len(report.checkpoints)} checkpoints, {len(report.loras)} shared LoRAs",
        "",
        f"{'checkpoint':{width}}  explained    UNet  text enc.  rel. error   not carried",
    ]
    lines += [
        f"{row.name:{width}}  {row.explained:9.2%} {row.explained_unet:7.2%} "
        f"{row.explained_text_encoder:9.2%}  {row.error:10.4f}  {row.not_carried:12.3%}"
        for row in report.checkpoints
    ]
    lines += ["", *_comparison(report), "", *_carried(report), "", *_bytes(report)]
    return "\n".join(lines) + "\n"


def _rows(analysis: Analysis, found: Fit, names: Sequence[str]) -> tuple[CheckpointReport, ...]:
    parts = [layer.part for layer in analysis.layers]
    unet, encoder = (
        found.explained(torch.tensor([part == which for part in parts])).tolist() for which in PARTS
    )
    layers = found.energies.sum(0)
    outside = torch.stack(list(analysis.not_carried.values())).sum(0)
    return tuple(
        CheckpointReport(
            name=name,
            explained=explained,
            explained_unet=unet[c],
            explained_text_encoder=encoder[c],
            error=max(1 - explained, 0.0) ** 0.5,
            not_carried=_share(outside[c], layers[c] + outside[c]),
            multipliers=tuple(found.multipliers[c].tolist()),
        )
        for c, (name, explained) in enumerate(zip(names, found.explained().tolist(), strict=True))
    )


def _comparison(report: Report) -> list[str]:
    alone = 1.0 if report.loss or report.private_loss else 0.0
    rows = [
        ("average alone", alone, ""),
        ("private LoRAs of the same bytes", report.private_loss, ""),
        ("shared LoRAs, as written", report.loss, _over_bound(report)),
        ("lower bound for these ranks", report.bound, ""),
    ]
    steps = "blocks" if report.method == "greedy" else "sweeps"
    trail = " ".join(f"{loss:.4f}" for loss in report.losses)
    return [
        "loss: what stays unexplained, as a share of all differences in the layers",
        *(f"  {name:33} {value:.4f}{note}" for name, value, note in rows),
        f"  by {steps}, before rounding: {trail}",
    ]


def _over_bound(report: Report) -> str:
    return f"   {report.loss / report.bound:.2f} times the bound" if report.bound > 0 else ""


def _carried(report: Report) -> list[str]:
    shares = ", ".join(f"{kind} {share:.3%}" for kind, share in report.not_carried.items())
    return [f"not carried by LoRAs, as a share of all differences: {shares}"]


def _bytes(report: Report) -> list[str]:
    average, loras = report.bytes_average / 1e9, report.bytes_loras / 1e9
    after = f"hyper-model {average:.2f} GB + LoRAs {loras:.3f} GB = {average + loras:.2f} GB"
    return [f"{report.bytes_before / 1e9:.2f} GB of checkpoints -> {after}"]


def _share(part: Tensor | float, whole: Tensor | float) -> float:
    return float(part) / float(whole) if float(whole) > 0 else 0.0
