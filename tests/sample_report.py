"""A report with figures that no two fields share."""

from hyper_merge.runs.report import CheckpointReport, EndLayers, PartLoss, Report

REPORT = Report(
    name="mix",
    loras=("mix_0-8", "mix_1-4"),
    checkpoints=(
        CheckpointReport("anime", 0.8125, 0.8, 0.9125, 0.4330, 0.0123, (1.0, -0.5)),
        CheckpointReport("a_long_checkpoint", 1.0, 1.0, 1.0, 0.0, 0.0, (0.25, 1.0)),
    ),
    method="joint",
    losses=(0.5, 0.25, 0.12345),
    loss=0.125,
    private_loss=0.25,
    bound=0.1,
    not_carried={"norms": 0.005, "VAE": 0.0},
    bytes_before=4_264_000_000,
    bytes_average=2_132_000_000,
    bytes_loras=53_400_000,
    curve=((0.0, 0.0), (0.25, 0.5), (0.8125, 1.0)),
    similarity=((1.0, -0.5), (-0.5, 1.0)),
    parts=(
        PartLoss("TE00", "text_encoder", 0.25, 0.0125),
        PartLoss("IN01", "unet", 0.25, 0.05),
        PartLoss("MID", "unet", 0.25, 0.0),
        PartLoss("OUT02", "unet", 0.25, 0.0625),
    ),
    ends=EndLayers(0.03, carried=False),
)
