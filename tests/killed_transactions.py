"""Transactions whose process ends while they put files in place."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hyper_merge.checkpoints.io.atomic_file import StagedFile
from hyper_merge.checkpoints.io.journal import Journal, Step
from hyper_merge.checkpoints.io.leftovers import ClaimedFolders


class KilledError(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Ends the block after some steps of a transaction; nothing is cleaned up but locks."""
    apply, applied = Step.apply, []

    def apply_or_die(self, *, overwrite):
        if len(applied) == steps:
            raise KilledError
        apply(self, overwrite=overwrite)
        applied.append(self)

    def drop_locks(self):
        for lock in self._locks.values():
            lock.release()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "apply", apply_or_die)
        patch.setattr(Journal, "undo", lambda self: None)
        patch.setattr(StagedFile, "discard", lambda self: None)
        patch.setattr(ClaimedFolders, "release", drop_locks)
        with pytest.raises(KilledError):
            yield
