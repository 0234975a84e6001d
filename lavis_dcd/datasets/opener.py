"""The one opener of picture files, for checks, training and reports alike: no file runs a program or fills the memory.

Pillow reads some sixty formats, one of which (EPS) is a program that it has Ghostscript run, and it goes by a file's
content, not by its name. So only the formats of `formats_read` are tried, on a regular file that is already open,
within bounds of bytes, sides, proportions and pixels, and with a meter on the reading: a sound file of that size needs
no more.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import io
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, UnidentifiedImageError, features
from typing_extensions import override

from lavis_dcd.common.regular import IrregularError, open_regular
from lavis_dcd.common.texts import one_line

log = logging.getLogger(__name__)

MOST_BYTES = 500_000_000  # of a file
MOST_SIDE = 65_535  # pixels; JPEG's and GIF's own limit
MOST_PROPORTION = 200  # of the longer side to the shorter, which some processors scale to hundreds of pixels
MOST_PIXELS = 178_956_970  # where Pillow, too, takes a picture for an attack

_MOST_HEADER = 32 * 2**20  # bytes of a JPEG before its pixels: Pillow joins its EXIF parts in quadratic time
_MOST_IN_MEMORY = 128 * 2**20  # bytes of a file that is read whole before anything is checked: WebP, AVIF, HEIC
_MOST_READS = 1_000_000  # pieces that a file is read in, which bounds Pillow's loops over chunks, tags and frames
_MOST_BMP_READS = 8_000_000
_MOST_SCANNED = 100 * MOST_PIXELS  # pixels times scans of a JPEG; photographs have some ten scans

_ALWAYS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WebP", "GIF": "GIF", "BMP": "BMP", "TIFF": "TIFF", "PPM": "PPM"}
_HEIC_PLUGIN = "pillow_heif"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_NOT_READ = {
    b"%!PS": "EPS", b"\xc5\xd0\xd3\xc6": "EPS", b"%PDF": "PDF", b"8BPS": "PSD", b"\0\0\1\0": "ICO", b"<svg": "SVG",
    b"<?xm": "XML", b"<htm": "HTML", b"<!do": "HTML", b"<!DO": "HTML", b"\xd7\xcd\xc6\x9a": "WMF",
    b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\0\x0cJXL": "JPEG XL", b"\xff\x0a": "JPEG XL",
}  # fmt: skip


class PictureError(Exception):
    """A file that is no picture which is read; the reason, without the file's name."""


@functools.cache
def formats_read() -> dict[str, str]:
    """Return the formats that are read, by Pillow's name for each.

    AVIF is among them where Pillow was built with it, HEIC where the plug-in pillow-heif is installed.
    """
    Image.init()
    formats = dict(_ALWAYS)
    if "avif" in features.modules and features.check("avif"):
        formats["AVIF"] = "AVIF"
    if importlib.util.find_spec(_HEIC_PLUGIN) is not None:
        try:
            importlib.import_module(_HEIC_PLUGIN).register_heif_opener()
            formats["HEIF"] = "HEIC"
        except Exception as error:  # foreign code, which may raise anything
            log.warning("HEIC pictures are not read: %s cannot be imported (%s)", _HEIC_PLUGIN, one_line(str(error)))
    return formats


@contextmanager
def open_picture(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a picture file as Pillow's lazy picture; its pixels are decoded inside the block, whole or not at all.

    A link is followed. Of an animation it is the first frame.

    Raises:
        Exception: whatever Pillow and the system raise; `reason_of` puts it into words.
    """
    with whole_files_only(), open_regular(path, MOST_BYTES) as raw, _Metered(raw) as file:
        try:
            opened = Image.open(file, formats=list(formats_read()))
        except UnidentifiedImageError as error:
            raise PictureError(_unknown(file.start)) from error
        with opened as picture:
            _check_sides(*picture.size)
            file.allow_decoding(picture)
            yield picture


def picture_sha256(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal SHA-256 of a picture file, which need not be a picture.

    Raises:
        IrregularError: it is no regular file, is empty or too large.
        OSError, ValueError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path, MOST_BYTES) as raw:
        while block := raw.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _check_sides(width: int, height: int) -> None:
    longer, shorter = max(width, height), min(width, height)
    if width * height > MOST_PIXELS:
        raise PictureError(_TOO_MANY)
    if longer > MOST_SIDE:
        raise PictureError(f"{width} x {height} pixels; a side may have {MOST_SIDE}: make it smaller")
    if longer > MOST_PROPORTION * shorter:
        raise PictureError(
            f"{width} x {height} pixels; the longer side may be {MOST_PROPORTION} times the shorter: cut it"
        )


class _Metered(io.BufferedReader):
    """A file for Pillow to read from, no more and no more often than a sound picture needs.

    Args:
        raw: the open file.
    """

    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self._size = os.fstat(raw.fileno()).st_size
        self._reads, self._scanned, self._scan = _MOST_READS, 0, 0
        self.start = self.peek(16)[:16]
        self._left = self._size + 2**20
        if self.start.startswith(b"\xff\xd8"):
            self._left = min(self._left, _MOST_HEADER)
        elif self.start.startswith(b"RIFF") or self.start[4:8] == b"ftyp":
            self._left = min(self._left, _MOST_IN_MEMORY)

    def allow_decoding(self, picture: Image.Image) -> None:
        """Allow what decoding takes after the header was read."""
        pixels = picture.width * picture.height
        self._left = 4 * self._size + 2**20
        if picture.format == "BMP":
            self._reads += min(4 * pixels, _MOST_BMP_READS)  # a compressed one is read byte by byte, in Python
        elif picture.format == "PNG":
            self._reads += self._size // 64
        elif picture.format in ("JPEG", "MPO"):
            self._scan = pixels

    @override
    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._left + 1 if size is None or size < 0 else min(size, self._left + 1)
        data = super().read(wanted)
        self._left -= len(data)
        self._reads -= 1
        if self._left < 0 or self._reads < 0:
            raise PictureError("its parts are too many or too large, which may be an attack; save it anew")
        if self._scan:
            self._scanned += self._scan * data.count(b"\xff\xda")
            if self._scanned > _MOST_SCANNED:
                raise PictureError("a JPEG of very many scans, which may be an attack; save it anew")
        return data


_TOO_MANY = f"more than {MOST_PIXELS} pixels, which may be an attack on memory; make it smaller"


def _unknown(start: bytes) -> str:
    names = ", ".join(formats_read().values())
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC and "HEIF" not in formats_read():
        return f"HEIC, which takes a plug-in (pip install lavis-dcd[heic]); or save it as one of {names}"
    name = next((name for first, name in _NOT_READ.items() if start.startswith(first)), None)
    if start[4:6] in (b"\x11\xaf", b"\x12\xaf"):
        name = "FLI"
    if name is not None:
        return f"{name}, none of the formats that are read ({names}); save it as one of them"
    return f"no picture of a format that is read ({names}); save it as one of them"


def reason_of(error: Exception) -> str:
    """The reason why a picture could not be read, in a user's words."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    if isinstance(error, Image.DecompressionBombError):
        return _TOO_MANY
    if isinstance(error, MemoryError):
        return "the memory does not suffice to decode it"
    if isinstance(error, IrregularError | PictureError):
        return str(error)
    text = one_line(str(getattr(error, "strerror", None) or error or type(error).__name__))
    if "MAX_TEXT" in text:
        return "its texts or its colour profile unpack to more than 1 MB, which may be an attack; save it without them"
    return text


class _Strictness:
    """The number of strict readers at work, and PIL's switch as it was before the first of them."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, False


_strictness = _Strictness()


@contextmanager
def whole_files_only() -> Iterator[None]:
    """Have PIL refuse pictures that are cut short. Several threads may be inside.

    `import lavis` allows them for the whole process: their rest would be grey, unnoticed.
    """
    with _strictness.lock:
        if not _strictness.inside:
            _strictness.before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _strictness.inside += 1
    try:
        yield
    finally:
        with _strictness.lock:
            _strictness.inside -= 1
            if not _strictness.inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = _strictness.before
