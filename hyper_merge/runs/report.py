"""Describes the figures of a merge: losses by checkpoint and section, baselines, bytes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from torch import Tensor

from hyper_merge.checkpoints.architectures.layout import Layer
from hyper_merge.decomposition.linalg import share
from hyper_merge.loras.prompt_tags import companion_names, format_tags
from hyper_merge.runs.plain_data import read_plain

PARTS: Final = {"unet": "UNet", "text_encoder": "text encoder"}

A1111: Final = "AUTOMATIC1111"
FORGE_AND_COMFYUI: Final = "Forge and ComfyUI"

_MUCH_OF_EXPLAINED: Final = 0.01  # of what the LoRAs explain, lost again by rounding
_MUCH_OF_LOSS: Final = 0.1  # of what they do not explain, added by rounding

_ROUNDING: Final = 1e-3  # by which two computations of a share may differ


@dataclass(frozen=True)
class TrainingReport:
    """What a training of the LoRAs by runs of the network came to.

    Attributes:
        rounds: Of batches, one for every checkpoint.
        before: By checkpoint: squared difference of the network's outputs, as a share of the average's.
        after: The same after the training.
    """

    rounds: int
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def has_gained(self) -> bool:
        """Whether the LoRAs are the trained ones."""
        return self.after != self.before


@dataclass(frozen=True)
class CheckpointReport:
    """The figures of one checkpoint."""

    name: str
    explained: float  # share of its deviation, 0..1
    explained_unet: float
    explained_text_encoder: float
    error: float  # norm of what is left, as a fraction of the deviation's norm
    not_carried: float  # share of its whole deviation that lies in tensors that no LoRA carries
    multipliers: tuple[float, ...]  # of the UNet, or of everything
    text_multipliers: tuple[float, ...] = ()  # of the text encoder, where it has its own
    topup: str = ""  # name of a private LoRA, to be added with multiplier 1
    # As the loss counts it, or as runs of the networks measured it; 0 in reports of earlier versions.
    explained_weighted: float = 0.0

    @property
    def fidelity(self) -> float:
        """The explained share by which all is judged: measured, or as the loss counts it, where known."""
        return self.explained_weighted or self.explained

    def multipliers_of(self, part: str) -> tuple[float, ...]:
        """Returns the multipliers of the layers of a part, "unet" or "text_encoder"."""
        return (part == "text_encoder" and self.text_multipliers) or self.multipliers


@dataclass(frozen=True)
class PartLoss:
    """The differences within one section of the network, and what is lost of them."""

    name: str  # "IN00".."IN11", "MID", "OUT00".."OUT11", "TE00"..
    which: str  # "unet" or "text_encoder"
    energy: float  # share of all differences in the layers that lies here
    lost: float  # share of all differences in the layers that stays unexplained here


@dataclass(frozen=True)
class CompanionGain:
    """The share of one kind of tensor, which LoRAs cannot hold, that their companions restore."""

    kind: str  # "norms", "biases"
    share: float  # of these tensors' differences, 0..1


@dataclass(frozen=True)
class EndLayers:
    """The layers at the ends of the network, which only companions can hold."""

    share: float  # of all differences in the layers, as the loss weighs them, 0..1
    carried: bool  # whether they are among the layers of the other figures


@dataclass(frozen=True)
class PrecisionLoss:
    """An estimate of what rounding adds to the loss in programs that hold weights in half precision."""

    hosts: str
    added: float  # share of all differences in the layers
    worst: float  # share of its own differences, of the checkpoint with the largest


@dataclass(frozen=True)
class Report:
    """All figures of a merge; fractions are of squared norms ("energy")."""

    name: str
    loras: tuple[str, ...]  # names in prompts
    checkpoints: tuple[CheckpointReport, ...]
    method: str
    losses: tuple[float, ...]  # after each sweep, before rounding
    loss: float  # of the written files
    # None where the loss weighs layers or checkpoints, and the weighted ones below are known instead.
    private_loss: float | None  # of private LoRAs of the same bytes
    bound: float | None  # no LoRAs of these ranks go below
    not_carried: Mapping[str, float]  # kind -> share of all deviations, layers included
    bytes_before: int
    bytes_average: int
    bytes_loras: int
    # Empty in reports of the first version.
    curve: tuple[tuple[float, ...], ...] = ()  # (R + 1, k): explained with the first j LoRAs
    similarity: tuple[tuple[float, ...], ...] = ()  # (k, k): cosines of the deviations
    parts: tuple[PartLoss, ...] = ()  # in the network's order
    companions: tuple[str, ...] = ()  # of some LoRAs or all, to be used with their multipliers
    recovered: tuple[CompanionGain, ...] = ()  # by these companions
    groups: tuple[
        tuple[int, ...], ...
    ] = ()  # places of checkpoints, where they fall into unlike ones
    between_groups: float = 0.0  # share of all differences that an average for each would take away

    rounding: tuple[PrecisionLoss, ...] = ()  # by the way in which hosts add LoRAs
    # As the loss counts them, with the weights of layers and checkpoints; 0 where it is not known.
    metric: str = ""  # the recipe's word for the layers' weights; "layout" where nothing was run
    weighted_loss: float = 0.0
    weighted_private_loss: float = 0.0
    weighted_bound: float = 0.0
    training: TrainingReport | None = None  # where the recipe asked for it
    shared_fidelity: tuple[float, ...] = ()  # (k,): of the shared LoRAs alone
    ends: EndLayers | None = None  # None in earlier versions, and where hosts take none from a LoRA

    @property
    def explained_mean(self) -> float:
        """Mean of the checkpoints' explained shares, 0..1: each counts as much as any other."""
        return sum(row.explained for row in self.checkpoints) / max(len(self.checkpoints), 1)

    @property
    def worst(self) -> CheckpointReport:
        """The checkpoint that is explained least, as the loss counts it."""
        return min(self.checkpoints, key=lambda row: row.fidelity)

    @property
    def fidelity_mean(self) -> float:
        """Mean of the checkpoints' `fidelity`, 0..1.

        Where it is not measured it is by default an estimate of what the network does: on trained
        families what is lost of the network's outputs is less than this says.
        """
        return sum(row.fidelity for row in self.checkpoints) / max(len(self.checkpoints), 1)

    @property
    def is_measured(self) -> bool:
        """Whether runs of the networks measured `fidelity`, as a training does without private LoRAs."""
        if self.training is None:
            return False
        pairs = zip(self.checkpoints, self.training.after, strict=True)
        return all(row.explained_weighted == 1 - left for row, left in pairs)

    @property
    def explained_of_all(self) -> float:
        """Explained share of all differences in the layers, 0..1, by the shared LoRAs.

        Checkpoints that differ more count more. It is what the loss leaves, so private LoRAs, which
        have no part in the loss, have none here.
        """
        return 1.0 - self.loss

    @property
    def costly_rounding(self) -> PrecisionLoss | None:
        """The loss in AUTOMATIC1111, which rounds after every LoRA, if worth mentioning; else None."""
        most = min(_MUCH_OF_EXPLAINED * self.explained_of_all, _MUCH_OF_LOSS * self.loss)
        return next((x for x in self.rounding if x.hosts == A1111 and x.added > most), None)

    def tags(self, row: CheckpointReport) -> str:
        """Returns the prompt tags of a checkpoint, one for each LoRA and companion that adds anything."""
        loras = format_tags(self.loras, row.multipliers, row.text_multipliers)
        pairs = self.companion_multipliers(row)
        companions = format_tags([name for name, _ in pairs], [x for _, x in pairs])
        private = format_tags([row.topup], [1.0]) if row.topup else ""
        return " ".join(filter(None, (loras, companions, private)))

    def companion_multipliers(self, row: CheckpointReport) -> tuple[tuple[str, float], ...]:
        """Returns every companion with a checkpoint's multiplier, which is that of its LoRA's UNet."""
        owners = zip(self.companions, self.companion_owners, strict=True)
        return tuple((name, row.multipliers[owner]) for name, owner in owners)

    @property
    def companion_owners(self) -> tuple[int, ...]:
        """The places of the companions' LoRAs."""
        names = companion_names(self.loras)
        return tuple(names.index(name) for name in self.companions)

    @property
    def carries_ends(self) -> bool:
        """Tells whether the layers at the ends of the network are among the layers."""
        return self.ends is not None and self.ends.carried

    @property
    def topups(self) -> tuple[str, ...]:
        """The names of the private LoRAs."""
        return tuple(row.topup for row in self.checkpoints if row.topup)

    def without_topups(self, lost: Container[str], *, requested: bool) -> Report:
        """Returns the report with the shares that the existing LoRAs explain.

        Args:
            lost: names of LoRAs that are missing, or are another file.
            requested: whether the recipe asked for private LoRAs: earlier versions lost some whose
                names became one word, and reported shares as if they existed.
        """
        if not self.curve or not requested:
            return self
        unknown = (0.0,) * len(self.checkpoints)
        rows = tuple(
            _without_topup(row, shared, fidelity)
            if row.explained > shared + _ROUNDING and (row.topup in lost or not row.topup)
            else row
            for row, shared, fidelity in zip(
                self.checkpoints, self.curve[-1], self.shared_fidelity or unknown, strict=True
            )
        )
        return replace(self, checkpoints=rows)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for the manifest."""
        data = asdict(self)
        absent = {name for name in ("ends", "training") if data[name] is None}
        return {name: x for name, x in data.items() if name not in absent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Returns the report that `as_dict` gave these data, also after a round trip through JSON.

        Raises:
            ValueError: a figure is missing or of another kind, or there are more or fewer figures
                than checkpoints and LoRAs; says where.
        """
        if "relative_loss" in data:  # of an earlier version
            data = {**data, "metric": "relative", "weighted_loss": data["relative_loss"]}
        report: Report = read_plain(cls, data, "report")
        k, blocks = len(report.checkpoints), len(report.loras)
        if not set(report.companions) <= set(companion_names(report.loras)):
            raise ValueError("expected a LoRA for every name in report.companions")
        if not k:
            raise ValueError("expected one checkpoint or more in report.checkpoints, got none")
        for name, rows, (count, length) in (
            ("multipliers", [row.multipliers for row in report.checkpoints], (k, blocks)),
            (
                "text_multipliers",
                [row.text_multipliers for row in report.checkpoints if row.text_multipliers],
                (k, blocks),
            ),
            ("curve", report.curve, (blocks + 1, k)),
            ("similarity", report.similarity, (k, k)),
            ("shared_fidelity", [report.shared_fidelity] * bool(report.shared_fidelity), (1, k)),
            ("training", _training_rows(report.training), (2, k)),
        ):
            if rows and [len(row) for row in rows] != [length] * count:
                raise ValueError(f"expected {count} rows of {length} figures in report.{name}")
        return report


def _training_rows(training: TrainingReport | None) -> list[tuple[float, ...]]:
    return [training.before, training.after] if training else []


def _without_topup(row: CheckpointReport, shared: float, fidelity: float) -> CheckpointReport:
    """Returns the row with the shared LoRAs' explained shares, which limit that of each part."""
    return replace(
        row,
        explained=shared,
        explained_unet=min(row.explained_unet, shared),
        explained_text_encoder=min(row.explained_text_encoder, shared),
        error=max(1 - shared, 0.0) ** 0.5,
        explained_weighted=fidelity,
    )


def part_losses(
    layers: Sequence[Layer],
    energies: Tensor,  # (layers, ...): squared norms of the deviations
    errors: Tensor,  # (layers, ...): squared norms of what is left
) -> tuple[PartLoss, ...]:
    """Returns sums over the layers of each section, in the order in which the sections begin."""
    total = energies.sum()
    groups: dict[tuple[str, str], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault((layer.section, layer.part), []).append(index)
    return tuple(
        PartLoss(
            name=name,
            which=which,
            energy=share(energies[members].sum(), total),
            lost=share(errors[members].sum(), total),
        )
        for (name, which), members in groups.items()
    )
