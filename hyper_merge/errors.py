"""Every way in which the user's input or machine can be refused; no imports of the package.

A refusal is data: what was expected and what came, where, and what to do. Each screen says it in its
own form; `str(error)` is the whole text. Anything that is not a `HyperMergeError` is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class HyperMergeError(Exception):
    """Base of all refusals; `str(error)` is the whole text for the user.

    Attributes:
        message: What was expected and what came; it names the file or the tensor that it is about.
        hint: What to do; empty where the message leaves no doubt.
        where: The place in the user's input, as people read it, such as "option --ranks"; it stands
            before the message. Empty where the message is about no setting.
        file: Path of the file in question; None where there is none.
        key: Name of the setting, or of the tensor in `file`; None where there is none.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        where: str = "",
        file: Path | None = None,
        key: str | None = None,
    ) -> None:
        """Takes the parts of the text; each can be changed while the error is on its way."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.file = file
        self.key = key

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        text = f"{text}; {self.hint}" if self.hint else text
        # Names of files may hold bytes that are no letters, which no screen and no log could show.
        return text.encode(errors="backslashreplace").decode()


@contextmanager
def settings_placed(where: Callable[[str], str], key: str | None = None) -> Iterator[None]:
    """Says of refusals within the block which setting they are about, and where it stands.

    Blocks within one another: the outermost knows best where a setting stands, the innermost which.

    Args:
        where: returns the place of a setting by its key, as people read it.
        key: the setting; None where the refusals within say it themselves.
    """
    try:
        yield
    except HyperMergeError as error:
        error.key = error.key or key
        if error.key is not None:
            error.where = where(error.key)
        raise


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
    """This very merge is there already.

    Attributes:
        run: Name of the run that it is.
    """

    def __init__(self, message: str, run: str, hint: str = "") -> None:
        """Takes the run besides the parts of the text."""
        super().__init__(message, hint=hint)
        self.run = run
        self.args = (message, run, hint)  # by which it is made again in another process


class DeviceError(HyperMergeError, RuntimeError):
    """The device that was asked for is absent or too small."""


class ClusterError(HyperMergeError, RuntimeError):
    """Other processes or machines cannot take part in a run: absent, different, lost, or too small."""


class RunError(HyperMergeError, ValueError):
    """An earlier run cannot be read, or may not be deleted: damaged, newer, unknown, a link."""


class UnknownRunError(RunError):
    """There is no run of this name."""


class ExtractionError(HyperMergeError, ValueError):
    """No LoRA can be made: checkpoints that do not differ, or a run's LoRAs that were replaced."""


class PictureError(HyperMergeError, ValueError):
    """Pictures cannot be made with these settings, or not by this host."""


class CacheError(HyperMergeError, OSError):
    """The cache of analyses cannot be cleared."""


class DamagedCacheError(HyperMergeError, ValueError):
    """A file of the cache is not what was written; whoever uses it sets it aside and makes it again.

    Attributes:
        path: Path of the file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        """Takes what the message is made of."""
        super().__init__(
            f"{path} is damaged ({reason}), and nothing was written",
            hint="run again, and where this is said again check the disk and the memory of this"
            " machine",
            file=path,
        )
        self.args = (path, reason)  # by which it is made again in another process
        self.path = path
        self.reason = reason


class AppError(HyperMergeError, ValueError):
    """The app cannot be served with these options."""


class InterruptedRun(HyperMergeError):  # noqa: N818 - a request, not an error
    """The user stopped the run; nothing half-written is left behind."""
