"""Arguments and steps that the commands on LoRAs share."""

from __future__ import annotations

import argparse

from hyper_merge.cli.arguments import add_damaged_option
from hyper_merge.cli.output import say
from hyper_merge.cli.progress_bar import progress_bar
from hyper_merge.recipe.loading import option_place
from hyper_merge.recipe.plain_values import plain_value


def add_size_arguments(parser: argparse.ArgumentParser, *, needed: bool) -> None:
    """Adds the options that say how far ranks are cut, of which one is needed or at most one given."""
    group = parser.add_mutually_exclusive_group(required=needed)
    group.add_argument("--rank", metavar="N", help="the most that a layer keeps")
    group.add_argument(
        "--size", metavar="SIZE", help="of the file, such as 50MB: ranks go where they keep most"
    )
    group.add_argument(
        "--keep",
        metavar="SHARE",
        help="of the squared norm of all changes, such as 95%%, with the fewest bytes",
    )


def add_output_arguments(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds the options for the file that is made."""
    parser.add_argument("--to", metavar="FILE", help=f"FILE.safetensors (default: {default})")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")
    add_damaged_option(parser)


def add_multipliers_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the LoRAs' multipliers, in all and by block."""
    parser.add_argument(
        "--multipliers",
        metavar="X",
        nargs="+",
        help="one number per LoRA, in their order (default: 1 each)",
    )
    parser.add_argument(
        "--block_weights",
        metavar="W,W,...",
        nargs="+",
        help="one text per LoRA, as the extension LoRA Block Weight has them (lbw=): 12 or 20 numbers for"
        " XL, 17 or 26 for SD 1.x and 2.x, 61 for Flux, a line or a name of its presets, or one number"
        " for all blocks",
    )


def add_application_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the checkpoint, the LoRAs, and the file's options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the file")
    parser.add_argument("loras", metavar="LORA", nargs="+", help="one file or more")
    add_multipliers_argument(parser)
    add_output_arguments(parser, "beside the checkpoint, named after all files")


def run_application(options: argparse.Namespace, *, subtract: bool) -> None:
    """Writes the checkpoint and prints what it was made of."""
    from hyper_merge.operations.loras.apply import run_apply
    from hyper_merge.operations.loras.request import ApplyRequest
    from hyper_merge.operations.loras.text import format_application

    values = {**tool_values(options), "checkpoint": options.checkpoint, "subtract": subtract}
    request = ApplyRequest.parse(values, option_place)
    with progress_bar() as progress:
        applied = run_apply(request, progress)
    say(format_application(applied))


def run_combination(options: argparse.Namespace) -> None:
    """Writes the LoRA and prints how much of the exact sum it holds."""
    from hyper_merge.operations.loras.combine import run_combine
    from hyper_merge.operations.loras.request import CombineRequest
    from hyper_merge.operations.loras.text import format_combination

    sizes: dict[str, object] = {"size": options.size, "dtype": options.dtype}
    sizes |= {
        name: plain_value(value) if isinstance(value, str) else None
        for name, value in (("rank", options.rank), ("keep", options.keep))
    }
    request = CombineRequest.parse({**tool_values(options), **sizes}, option_place)
    with progress_bar() as progress:
        combined = run_combine(request, progress)
    say(format_combination(combined))


def tool_values(options: argparse.Namespace) -> dict[str, object]:
    """Returns the values of the options that all of these commands have."""
    words = getattr(options, "multipliers", None)
    return {
        "loras": options.loras,
        "multipliers": None if words is None else " ".join(words),
        "block_weights": getattr(options, "block_weights", None),
        "to": options.to,
        "overwrite": options.overwrite,
        "damaged": options.damaged,
    }
