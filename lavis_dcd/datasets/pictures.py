"""Pictures as a person sees them, for models, reports and checks."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line
from lavis_dcd.datasets.opener import open_picture, reason_of
from lavis_dcd.datasets.tree import original, plain_sets

log = logging.getLogger(__name__)

MODES = ("fast", "full", "off")  # of the check at the start
NAMED = 20  # its faults named one by one; the rest is counted

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE = 32_000_000  # pixels of a picture that is verified with no other such beside it, for the memory's sake
_one_large = threading.Lock()
_WIDE_FORMATS = ("PNG", "PPM")  # mode "I" of these holds 16 bits


@runtime_checkable
class MakesPictures(Protocol):
    """A data set whose pictures are no files."""

    def picture(self, index: int) -> Image.Image:
        """The unprocessed RGB picture of item ``index``."""


def load_picture(dataset: Any, index: int, side: int | None = None) -> Image.Image:
    """The unprocessed RGB picture of item `index`.

    A file is shown as a viewer shows it: turned as its EXIF entry says, what is transparent on white, 16 bits of
    grey scaled to 8, of an animation the first frame.

    Args:
        dataset: one that ``MakesPictures``, or any LAVIS data set of files (`annotation`, `vis_root`).
        side: for thumbnails of so many pixels. A JPEG is then decoded at a scale that leaves twice as many, a third
            of the time for large photographs. After shrinking, pixels differ by 0.4 of 255 on average (5 at most);
            at 384 px, what a model would read differs by up to 11, so models never read such pictures.

    Raises:
        UserError: the file is missing, no picture, or cut short.
    """
    dataset = original(dataset)
    if isinstance(dataset, MakesPictures):
        return dataset.picture(index)
    path = os.path.join(dataset.vis_root, dataset.annotation[index]["image"])
    try:
        with open_picture(path) as opened:
            if side is not None:
                opened.draft("RGB", (2 * side, 2 * side))
            return as_seen(opened)
    except Exception as error:  # PIL's readers of damaged files raise a dozen kinds of errors, which name no file
        raise UserError(unreadable(path, reason_of(error))) from error


def unreadable(path: str, reason: str) -> str:
    """What is told of a file that cannot be read while a job is at work."""
    return f"{one_line(path)}: no readable picture ({reason}); run.verify=full finds all such files"


def as_seen(picture: Image.Image) -> Image.Image:
    """An opened picture of any mode as RGB, upright.

    Raises:
        ValueError: its values have no fixed range (32 bits).
    """
    check_mode(picture)
    if picture.mode.startswith("I"):
        wide = np.asarray(picture).astype(np.int64).clip(0, 65535)
        made = Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    elif picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        made = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    else:
        made = picture.convert("RGB")
    turn = _TURNS.get(_orientation(picture))  # once it is decoded: Pillow turns a TIFF by itself, and drops the entry
    return made if turn is None else made.transpose(turn)


def check_mode(picture: Image.Image) -> None:
    """Check that the values of an opened picture have a fixed range.

    Raises:
        ValueError: they have none.
    """
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in _WIDE_FORMATS):
        raise ValueError("32 bits a value, whose range nothing tells; save it with 8 or 16 bits")


def _orientation(picture: Image.Image) -> Any:
    try:
        return picture.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block, of which PIL raises many kinds of errors, spoils no pixel
        return None


def verify_pictures(dataset: Any, mode: str = "fast") -> None:
    """Check the picture files of a LAVIS data set (``annotation`` and ``vis_root``) or a concatenation of some.

    Args:
        dataset: sets whose pictures are no files (``vis_root`` is None or the set draws them) pass unread.
        mode: ``fast`` opens every file and reads its header, ``full`` decodes it, ``off`` does nothing.

    Raises:
        UserError: an unknown mode, or pictures that are missing or broken; up to 20 are named, the rest counted.
    """
    if mode not in MODES:
        raise UserError(f"run.verify: {mode!r} is none of {', '.join(MODES)}")
    if mode == "off":
        return
    paths = list(dict.fromkeys(path for plain in plain_sets(dataset, "").values() for path in _files(plain)))
    with ThreadPoolExecutor() as pool:
        faults = [fault for fault in pool.map(lambda path: _fault(path, mode), paths) if fault]
    if not faults:
        log.info("%d pictures verified (%s)", len(paths), mode)
        return
    lines = faults[:NAMED]
    if len(faults) > NAMED:
        lines.append(f"... and {len(faults) - NAMED} more pictures")
    lines.append(
        f"{len(faults)} of {len(paths)} pictures cannot be read: put them in place or take their rows out of the "
        "annotations (run.verify=off skips this check, training then fails at the first of them)"
    )
    raise UserError(lines)


def _files(dataset: Any) -> list[str]:
    root = getattr(dataset, "vis_root", None)
    if root is None or isinstance(dataset, MakesPictures):
        return []
    return [os.path.join(root, row["image"]) for row in dataset.annotation]


def _fault(path: str, mode: str) -> str | None:
    try:
        with open_picture(path) as picture:
            check_mode(picture)
            if mode == "full":
                large = picture.width * picture.height > _LARGE
                # An eighth of a JPEG's pixels, yet all of its stream: of 4,400 cut and scrambled photographs it finds
                # the very same as a full decoding, in half (224 px) to a quarter (12 megapixels) of the time.
                picture.draft(None, (1, 1))
                with _one_large if large else nullcontext():
                    picture.load()
    except FileNotFoundError:
        return f"{one_line(path)}: missing"
    except Exception as error:  # PIL's readers of damaged files raise a dozen kinds of errors
        return f"{one_line(path)}: no readable picture ({reason_of(error)})"
    return None
