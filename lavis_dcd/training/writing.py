"""Writing to a run folder: what the disk refuses, or a folder that is gone, is one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavis_dcd.common.errors import UserError

_WAYS_OUT = {
    errno.ENOSPC: "free some space, then run.resume=auto goes on",
    errno.EDQUOT: "free some space, then run.resume=auto goes on",
    errno.EROFS: "make its disk writable, then run.resume=auto goes on",
    errno.EACCES: "permit it, then run.resume=auto goes on",
    errno.EPERM: "permit it, then run.resume=auto goes on",
}


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses while inside into a user error; a run folder that is gone is not made anew.

    Raises:
        UserError: the folder is gone, or something in it cannot be written.
    """
    try:
        require_folder(folder)
        yield
    except OSError as error:
        require_folder(folder)
        what = error.filename or folder
        way_out = _WAYS_OUT.get(error.errno or 0, "put that right, then run.resume=auto goes on")
        raise UserError(
            f"run.output_dir: {what} cannot be written ({error.strerror or error}); what was written before stays: "
            f"{way_out}"
        ) from error


def require_folder(folder: Path) -> None:
    """Refuse to go on where a run folder is gone: a new one would lack all that was in it.

    Raises:
        UserError: it is.
    """
    if not folder.is_dir():
        raise UserError(
            f"run.output_dir: the run folder {folder} is gone: somebody removed or moved it while the job ran; put it "
            "back and continue with run.resume=auto, or start the job again"
        )
