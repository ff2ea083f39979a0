"""Every way in which the user's input or machine can be refused; no imports of the package.

Messages are written for the person at the keyboard: what was expected, what came, which file and
key, what to do. Anything that is not a `HyperMergeError` is a bug of ours.
"""

from __future__ import annotations

from pathlib import Path


class HyperMergeError(Exception):
    """Base of all refusals; `str(error)` is the whole message for the user."""


class RecipeError(HyperMergeError, ValueError):
    """A setting is unknown, of the wrong type, impossible, or contradicts another one."""


class CheckpointError(HyperMergeError, ValueError):
    """A file cannot be read as a checkpoint: missing, damaged, unsafe, or something else."""


class FamilyError(CheckpointError):
    """A readable file of an architecture that is not supported, or not a checkpoint at all."""


class MismatchError(CheckpointError):
    """Checkpoints that cannot be merged with one another: families, keys or shapes differ."""


class NonFiniteError(CheckpointError):
    """A tensor holds NaN or infinity."""


class RankError(HyperMergeError, ValueError):
    """A rank is not possible for the matrix at hand."""


class OutputError(HyperMergeError, OSError):
    """The output cannot be written: it exists, the folder is read-only, or the disk is full."""


class NameTakenError(OutputError):
    """The name belongs to a file of something else."""


class SameMergeError(OutputError):
    """This very merge is there already."""


class DeviceError(HyperMergeError, RuntimeError):
    """The device that was asked for is absent or too small."""


class RunError(HyperMergeError, ValueError):
    """An earlier run cannot be read, or may not be deleted: damaged, newer, unknown, a link."""


class UnknownRunError(RunError):
    """There is no run of this name."""


class ExtractionError(HyperMergeError, ValueError):
    """No LoRA can be made of this: checkpoints that do not differ, a run's LoRAs that are not its own."""


class PictureError(HyperMergeError, ValueError):
    """Pictures cannot be made like this, or not here."""


class CacheError(HyperMergeError, OSError):
    """The cache of analyses cannot be cleared."""


class DamagedCacheError(HyperMergeError, ValueError):
    """A file of the cache is not what was written; whoever uses it sets it aside and makes it again.

    Attributes:
        path: Of the file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        """Takes what the message is made of."""
        super().__init__(
            f"{path} is damaged ({reason}), and nothing was written; run again, and where this is"
            " said again check the disk and the memory of this machine"
        )
        self.path = path
        self.reason = reason


class AppError(HyperMergeError, ValueError):
    """The app cannot be served like this."""


class InterruptedRun(HyperMergeError):  # noqa: N818 - the user's wish, not an error
    """The user stopped the run; nothing half-written is left behind."""
