"""Lets one process make an analysis while the others that need it wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hyper_merge.analysis.cache import ANY, AnalysisKind, find_analysis, new_analysis_path
from hyper_merge.analysis.inputs import MergeInputs
from hyper_merge.analysis.streaming_pass import PassOptions
from hyper_merge.analysis.use_markers import in_use, making
from hyper_merge.runtime.damaged_files import DamagedFiles
from hyper_merge.runtime.progress import Progress


@dataclass(frozen=True)
class Turn:
    """An analysis that is kept from deletion, or the turn to make it."""

    path: Path
    exists: bool
    end_making: Callable[[], None]  # to be called once it is made, so that others may use it


@contextmanager
def analysis_turn(
    folder: Path,
    inputs: MergeInputs,
    options: PassOptions,
    ranks: Sequence[int],
    damaged: DamagedFiles,
    progress: Progress,
    kind: AnalysisKind = ANY,
) -> Iterator[Turn]:
    """Gives a suitable analysis, kept from deletion within the block, or the turn to make one.

    Args:
        folder: of the cache.
        inputs: the files.
        options: the options of the pass.
        ranks: the ranks that the analysis must suit.
        damaged: files that are not to be used.
        progress: reports while another process makes the same analysis, and may end the wait.
        kind: which analyses will do, and which is to be made.

    Raises:
        InterruptedRun: the user ended the wait.
    """
    with ExitStack() as kept:
        find = partial(find_analysis, folder, inputs, options, ranks, damaged, kind)
        path = _kept(kept, find)
        if path is not None:
            yield Turn(path, exists=True, end_making=lambda: None)
            return
        new_path = new_analysis_path(folder, inputs, options, damaged, kind)
        kept.enter_context(in_use(new_path))
        with ExitStack() as turn:
            turn.enter_context(making(new_path, progress))
            # another process may have made it in the meantime
            path = _kept(kept, find)
            if path is not None:
                turn.close()
            yield Turn(path or new_path, path is not None, turn.close)


def _kept(kept: ExitStack, find: Callable[[], Path | None]) -> Path | None:
    """Returns a suitable analysis that is kept from deletion; None if there is none."""
    path = find()
    if path is not None:
        kept.enter_context(in_use(path))
        if not path.exists():  # it was deleted just before
            return None
    return path
