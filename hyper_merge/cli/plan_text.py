"""A plan as plain text."""

from __future__ import annotations

from hyper_merge.operations.merge.plan import MergePlan, PlannedSize
from hyper_merge.runs.report_text import format_groups
from hyper_merge.runtime.formatting import format_size


def format_plan(plan: MergePlan, *, of_loras: bool = False) -> str:
    """Returns the forecast as a table, the shares of the size asked for by checkpoint, and the groups.

    Args:
        plan: the forecast.
        of_loras: whether LoRAs are shared, without an average.
    """
    nothing = "none of them" if of_loras else "the average alone"
    points = sorted({*plan.points, plan.requested}, key=lambda point: point.size)
    result = "result" if of_loras else "merge"
    lines = [
        f"explained, from the spectra alone (the {result} itself comes out a little better):",
        "",
        f"{'LoRAs':>9}  {'shared: mean':>12} {'worst':>7}  {'private: mean':>13} {'worst':>7}  ranks",
        *(_line(point, is_requested=point == plan.requested) for point in points),
        f"{'0 kB':>9}  {0:12.2%} {0:7.2%}  {0:13.2%} {0:7.2%}  {nothing}",
        "",
        f"with {format_size(plan.requested.size)}:",
    ]
    width = max(len(name) for name in plan.names)
    shares = zip(plan.names, plan.requested.shared, plan.requested.private, strict=True)
    lines += [
        f"  {name:{width}}  {shared:7.2%}   private {private:7.2%}"
        for name, shared, private in shares
    ]
    return "\n".join([*lines, *_groups(plan)]) + "\n"


def _groups(plan: MergePlan) -> list[str]:
    if not plan.groups.are_apart:
        return []
    return ["", format_groups(plan.names, plan.groups.groups, plan.groups.between)]


def _line(point: PlannedSize, *, is_requested: bool) -> str:
    shared, private = (
        f"{sum(shares) / len(shares):{width}.2%} {min(shares):7.2%}"
        for shares, width in ((point.shared, 12), (point.private, 13))
    )
    ranks = ", ".join(map(str, point.ranks))
    return f"{format_size(point.size):>9}  {shared}  {private}  {ranks}{'   <- asked for' if is_requested else ''}"
