"""Formats the report on a run's originals as plain text."""

from __future__ import annotations

from typing import Final

from hyper_merge.operations.deletable import DeletionReport, DeletionVerdict
from hyper_merge.runtime.formatting import format_size
from hyper_merge.runtime.names import one_line

NOTHING_FREED: Final = "nothing: they are links, or have other names"
"""What deleting files frees of which something is left."""


def format_deletion_report(report: DeletionReport) -> str:
    """Returns the verdicts as a table of plain text."""
    names = [one_line(verdict.name) for verdict in report.verdicts]
    width = max(map(len, ["checkpoint", *names]))
    lines = [
        f"{report.run}: safe to delete is what is restored to {100 * report.threshold:.4g}%",
        "",
        f"{'checkpoint':{width}}  delete?      frees  layers  everything  not carried  VAE differs",
        *(_format_verdict(verdict, width) for verdict in report.verdicts),
        "",
        "deleting what is safe to delete would free"
        f" {format_size(report.frees) if report.frees else NOTHING_FREED}"
        if any(verdict.safe for verdict in report.verdicts)
        else "none of these is safe to delete",
        "nothing was deleted; that is up to you",
    ]
    if report.problem:
        lines.insert(1, f"nothing is safe to delete: {report.problem}")
    return "\n".join(lines)


def _format_verdict(verdict: DeletionVerdict, width: int) -> str:
    differs = {None: "not known", True: "yes", False: "no"}[verdict.vae_differs]
    answer = "yes" if verdict.safe else "no"
    notes = "" if verdict.safe else f"  ({verdict.reason})"
    if verdict.restored_as != verdict.path.stem:
        notes += f"  (restored as {verdict.restored_as})"
    return (
        f"{one_line(verdict.name):{width}}  {answer:7}  {format_size(verdict.frees):>9}"
        f"  {verdict.explained:6.2%}  {verdict.everything:10.2%}  {verdict.not_carried:11.3%}"
        f"  {differs}{notes}"
    )
