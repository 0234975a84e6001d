"""The opener of pictures: what it opens, pixel for pixel, and what it refuses before anything runs or grows."""

from __future__ import annotations

import ast
import io
import os
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets import opener
from lavis_dcd.datasets.opener import formats_read, open_picture
from lavis_dcd.datasets.pictures import load_picture, verify_pictures

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """A picture that hangs becomes a failure."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _set(path: Path) -> SimpleNamespace:
    return SimpleNamespace(vis_root=str(path.parent), annotation=[{"image": path.name}])


def refusals(path: Path, *modes: str) -> set[str]:
    """What the checks of these modes (by default both), and the loading, say of a file; all of them must refuse it."""
    said = set()
    for read in [*(lambda m=mode: verify_pictures(_set(path), m) for mode in modes or ("fast", "full")),
                 lambda: load_picture(_set(path), 0)]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            read()
        line = caught.value.faults[0]
        assert "\n" not in line and len(line) < 500 and line.startswith(f"{path}: no readable picture (")
        said.add(line.removesuffix("; run.verify=full finds all such files").partition(" (")[2][:-1])
    return said


def noise(side: int = 32, mode: str = "RGB") -> Image.Image:
    drawn = np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), np.uint8)
    return Image.fromarray(drawn).convert(mode)


# -- what it reads -----------------------------------------------------------------------------------------------

READ = [
    ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
    ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
    ("PPM", {}), ("MPO", {"save_all": True, "append_images": [noise(16)]}), ("AVIF", {}),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), READ, ids=[f"{k}{n}" for n, (k, _) in enumerate(READ)])
def test_pixels_are_pillows_own(tmp_path, kind, options, mode):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    noise(mode=mode).save(tmp_path / "x", kind, **options)
    verify_pictures(_set(tmp_path / "x"), "full")
    with Image.open(tmp_path / "x") as picture:
        expected = np.asarray(picture.convert("RGB"))
    assert (np.asarray(load_picture(_set(tmp_path / "x"), 0)) == expected).all()


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize(("value", "rows"), [(1, [[1, 2, 3], [4, 5, 6]]), (3, [[6, 5, 4], [3, 2, 1]]),
                                             (6, [[4, 1], [5, 2], [6, 3]]), (8, [[3, 6], [2, 5], [1, 4]])])  # fmt: skip
def test_a_tiff_is_turned_once(tmp_path, value, rows, compression):
    exif = Image.Exif()
    exif[0x0112] = value
    picture = Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8))
    picture.save(tmp_path / "x.tif", exif=exif, compression=compression)
    assert np.asarray(load_picture(_set(tmp_path / "x.tif"), 0))[:, :, 0].tolist() == rows


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_hundreds_of_frames_one_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), (n % 256, n // 256, 0)) for n in range(1, 301)]
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:], **{"lossless": True})
    verify_pictures(_set(tmp_path / "x"), "full")
    assert load_picture(_set(tmp_path / "x"), 0).getpixel((0, 0)) == (1, 0, 0)


def test_a_compressed_bmp_is_read(tmp_path):
    grey = b"".join(bytes([n, n, n, 0]) for n in range(256))
    runs = bytes([3, 7, 1, 9, 0, 0, 4, 5, 0, 1])  # rows from below: 7 7 7 9, then 5 5 5 5
    head = struct.pack("<IHHI", 54 + 1024 + len(runs), 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, 4, 2, 1, 8, 1, len(runs), 0, 0, 256, 0)
    (tmp_path / "x").write_bytes(b"BM" + head + info + grey + runs)
    rows = np.asarray(load_picture(_set(tmp_path / "x"), 0))[:, :, 0].tolist()
    assert rows == [[5, 5, 5, 5], [7, 7, 7, 9]]


def test_the_file_is_closed_and_pillows_switch_restored(tmp_path, monkeypatch):
    noise().save(tmp_path / "x", "PNG")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    before = len(os.listdir("/proc/self/fd"))
    with open_picture(tmp_path / "x") as picture:
        assert picture.size == (40, 32) and ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert len(os.listdir("/proc/self/fd")) == before and ImageFile.LOAD_TRUNCATED_IMAGES is True


# -- programs ----------------------------------------------------------------------------------------------------

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 100 100
%%EndComments
(MARK) (w) file dup (ran) writestring closefile
showpage
%%EOF
"""


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """The mark that a `gs` at the head of the path leaves when it is started."""
    from PIL import EpsImagePlugin

    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/started\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # to be looked for anew
    return tmp_path / "started"


@pytest.mark.parametrize("start", [b"", struct.pack("<4sIIIIIIH", b"\xc5\xd0\xd3\xc6", 30, len(EPS), 0, 0, 0, 0, 0)])
@pytest.mark.parametrize("name", ["holiday.jpg", "holiday.eps", "holiday"])
def test_no_picture_starts_ghostscript(tmp_path, ghostscript, name, start):
    mark = tmp_path / "written"
    (tmp_path / name).write_bytes(start + EPS.replace(b"MARK", str(mark).encode()))
    names = ", ".join(formats_read().values())
    assert refusals(tmp_path / name) == {f"EPS, none of the formats that are read ({names}); save it as one of them"}
    assert not ghostscript.exists() and not mark.exists()
    with pytest.raises(Exception):  # noqa: B017  whatever it is: Pillow alone does start it
        Image.open(tmp_path / name).load()
    assert ghostscript.exists()


def _saved(kind: str) -> Callable[[Path], Any]:
    return lambda path: noise().save(path, kind)


def _spider(path: Path) -> None:
    noise(mode="F").save(path.with_suffix(".spi"), "SPIDER")  # whose writer claims the file's ending for itself
    path.with_suffix(".spi").rename(path)


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "PDF": (_saved("PDF"), "PDF, none"),
    "ICO": (_saved("ICO"), "ICO, none"),
    "JPEG XL": (lambda path: path.write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99)), "JPEG XL, none"),
    "JPEG 2000": (_saved("JPEG2000"), "JPEG 2000, none"),
    "PSD": (lambda path: path.write_bytes(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(300)),
            "PSD, none"),
    "FLI": (lambda path: path.write_bytes(struct.pack("<IHHHHHH", 128, 0xAF11, 1, 8, 8, 8, 3) + bytes(300)),
            "FLI, none"),
    "WMF": (lambda path: path.write_bytes(b"\xd7\xcd\xc6\x9a" + bytes(200)), "WMF, none"),
    "SVG": (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "SVG, none"),
    "HTML": (lambda path: path.write_text("<html>404 Not Found</html>"), "HTML, none"),
    "TGA": (_saved("TGA"), "no picture of a format"), "SGI": (_saved("SGI"), "no picture of a format"),
    "PCX": (_saved("PCX"), "no picture of a format"), "ICNS": (_saved("ICNS"), "no picture of a format"),
    "DDS": (_saved("DDS"), "no picture of a format"), "IM": (_saved("IM"), "no picture of a format"),
    "SPIDER": (_spider, "no picture of a format"),
    "XBM": (lambda path: noise(mode="1").save(path, "XBM"), "no picture of a format"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_only_the_formats_of_the_list_are_read(tmp_path, kind):
    make, start = FOREIGN[kind]
    make(tmp_path / "x.jpg")
    names = ", ".join(formats_read().values())
    (line,) = refusals(tmp_path / "x.jpg")
    assert line.startswith(start) and line.endswith(f"({names}); save it as one of them")
    assert names.startswith("JPEG, PNG, WebP, GIF, BMP, TIFF, PPM")


# -- HEIC --------------------------------------------------------------------------------------------------------

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.fixture
def formats_anew(monkeypatch):
    """The list of formats is made anew, and forgotten afterwards."""
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    formats_read.cache_clear()
    yield monkeypatch
    formats_read.cache_clear()


def _plugin(monkeypatch, module: ModuleType | None) -> None:
    real = opener.importlib.util.find_spec
    spec = None if module is None else object()
    monkeypatch.setattr(opener.importlib.util, "find_spec", lambda name: spec if name == "pillow_heif" else real(name))
    monkeypatch.setitem(sys.modules, "pillow_heif", module)


def test_heic_without_its_plugin_is_told_which(tmp_path, formats_anew):
    _plugin(formats_anew, None)
    (tmp_path / "x.jpg").write_bytes(HEIC)
    names = ", ".join(formats_read().values())
    assert refusals(tmp_path / "x.jpg") == {
        f"HEIC, which takes a plug-in (pip install lavis-dcd[heic]); or save it as one of {names}"
    }


def test_heic_with_its_plugin_is_read(tmp_path, formats_anew):
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._size, self._mode = (4, 3), "RGB"
            self.tile = [ImageFile._Tile("raw", (0, 0, 4, 3), 24, "RGB")]

    module = ModuleType("pillow_heif")
    module.register_heif_opener = lambda: Image.register_open("HEIF", Heif, lambda prefix: prefix[8:12] == b"heic")
    _plugin(formats_anew, module)
    (tmp_path / "x.jpg").write_bytes(HEIC[:24] + bytes(range(36)))
    assert list(formats_read().values())[-1] == "HEIC"
    assert np.asarray(load_picture(_set(tmp_path / "x.jpg"), 0)).ravel().tolist() == list(range(36))


def test_a_broken_plugin_is_a_warning_and_all_else_is_read(tmp_path, formats_anew, caplog):
    _plugin(formats_anew, ModuleType("pillow_heif"))
    noise().save(tmp_path / "x", "PNG")
    assert load_picture(_set(tmp_path / "x"), 0).size == (40, 32)
    assert "HEIF" not in formats_read() and "HEIC pictures are not read" in caplog.text


def test_heic_by_the_real_plugin(tmp_path, formats_anew):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in formats_read()
    Image.new("RGB", (64, 32), "red").save(tmp_path / "x.jpg", "HEIF")
    assert np.abs(np.asarray(load_picture(_set(tmp_path / "x.jpg"), 0), int) - [255, 0, 0]).max() < 8


# -- bounds ------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, before: bytes = b"", after: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(min((width + 1) * height, 2**20))))  # all of them, if not too many
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND")


@pytest.mark.parametrize(("width", "height"), [(65535, 1), (1, 65535), (201, 1), (2, 403)])
def test_proportions_are_bounded(tmp_path, width, height):
    (tmp_path / "x.png").write_bytes(png(width, height))
    assert refusals(tmp_path / "x.png") == {
        f"{width} x {height} pixels; the longer side may be 200 times the shorter: cut it"
    }


def test_proportions_at_the_bound_are_read(tmp_path):
    (tmp_path / "x.png").write_bytes(png(3, 600))
    verify_pictures(_set(tmp_path / "x.png"), "full")
    assert load_picture(_set(tmp_path / "x.png"), 0).size == (3, 600)


def test_sides_are_bounded(tmp_path):
    (tmp_path / "x.png").write_bytes(png(65536, 400))
    assert refusals(tmp_path / "x.png") == {"65536 x 400 pixels; a side may have 65535: make it smaller"}


@pytest.mark.parametrize("limit", [None, 10**12])
def test_pixels_are_bounded_whatever_pillows_own_bound(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "x.png").write_bytes(png(13400, 13400))
    assert refusals(tmp_path / "x.png") == {
        "more than 178956970 pixels, which may be an attack on memory; make it smaller"
    }


def test_a_canvas_of_a_webp_is_not_allocated(tmp_path):
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" + b"\xff\0\0"  # 16,777,216 x 256
    (tmp_path / "x").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    (line,) = refusals(tmp_path / "x")
    assert "more than 178956970 pixels" in line or "could not create decoder object" in line


def test_links_to_what_has_no_end_and_files_that_are_none(tmp_path):
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.jpg")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(2**42)
    assert refusals(tmp_path / "zero.jpg") == {"it is a device, whose bytes have no end"}
    assert refusals(tmp_path / "fifo.jpg") == {"it is a FIFO, which holds nothing"}
    assert refusals(tmp_path / "sparse.jpg") == {"a file of 4398.0 GB, more than 500.0 MB: make it smaller"}


MANY = "its parts are too many or too large, which may be an attack; save it anew"


def _tiff_of_overlapping_tags() -> bytes:
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]  # fmt: skip
    tags += [(number, 7, 1_500_000, 8) for number in range(1000, 65000)]  # the same bytes under 64,000 names
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(1_000_000)


def _jpeg_of_exif() -> bytes:
    file = io.BytesIO()
    noise().save(file, "JPEG")
    part = b"\xff\xe1" + struct.pack(">H", 65000) + b"Exif\0\0" + bytes(64992)
    return file.getvalue()[:2] + 60 * part + file.getvalue()[2:]  # which Pillow joins one by one


HEADERS: dict[str, Callable[[], bytes]] = {
    "chunks of a PNG": lambda: png(8, 8, before=chunk(b"prVt") * 20_000),
    "junk in a JPEG": lambda: b"\xff\xd8\xff\xe0\0\2" + bytes(20_000),
    "fill bytes of a JPEG": lambda: b"\xff\xd8" + b"\xff" * 20_000,
    "comments of a GIF": lambda: b"GIF89a\x08\0\x08\0\0\0\0!\xfe" + b"\1a" * 20_000 + b"\0",
    "comment of a PPM": lambda: b"P6\n#" + b"a" * 20_000,
    "tags of a TIFF": _tiff_of_overlapping_tags,
    "EXIF of a JPEG": _jpeg_of_exif,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_many_parts_are_left(tmp_path, name, monkeypatch):
    monkeypatch.setattr(opener, "_MOST_READS", 10_000)  # in the place of a million, and files of a hundredth
    monkeypatch.setattr(opener, "_MOST_HEADER", 3_000_000)  # a tenth
    (tmp_path / "x").write_bytes(HEADERS[name]())
    assert refusals(tmp_path / "x") == {MANY}


def test_parts_behind_the_pixels_are_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(opener, "_MOST_READS", 10_000)
    (tmp_path / "x").write_bytes(png(8, 8, after=chunk(b"prVt") * 20_000))
    verify_pictures(_set(tmp_path / "x"), "fast")  # which looks at nothing there
    assert refusals(tmp_path / "x", "full") == {MANY}


@pytest.mark.parametrize("start", [b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0\x20ftypavif"])
def test_a_file_that_is_read_whole_is_bounded(tmp_path, start, monkeypatch):
    monkeypatch.setattr(opener, "_MOST_IN_MEMORY", 1_000_000)
    with open(tmp_path / "x", "wb") as file:
        file.write(start)
        file.truncate(2_000_000)
    assert refusals(tmp_path / "x") == {MANY}


def test_a_jpeg_of_a_thousand_scans_is_left(tmp_path):
    file = io.BytesIO()
    Image.new("L", (4096, 4096)).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole.rindex(b"\xff\xda")
    (tmp_path / "x").write_bytes(whole[:last] + 2000 * whole[last:-2] + whole[-2:])
    assert refusals(tmp_path / "x", "full") == {"a JPEG of very many scans, which may be an attack; save it anew"}


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_texts_and_profiles_that_unpack_to_the_memorys_size(tmp_path, kind):
    packed = zlib.compress(bytes(50_000_000))
    body = b"a\0\1\0\0\0" + packed if kind == b"iTXt" else b"a\0\0" + packed
    (tmp_path / "x").write_bytes(png(8, 8, before=chunk(kind, body)))
    assert refusals(tmp_path / "x") == {
        "its texts or its colour profile unpack to more than 1 MB, which may be an attack; save it without them"
    }


def test_an_exif_block_of_one_stretch_under_many_names_turns_nothing(tmp_path):
    entries = b"".join(struct.pack(">HHII", number, 7, 900_000, 8) for number in range(1, 30_000))
    block = b"MM\0*\0\0\0\x08" + struct.pack(">H", 29_999) + entries + bytes(600_000)
    (tmp_path / "x.png").write_bytes(png(8, 8, before=chunk(b"eXIf", block)))
    assert load_picture(_set(tmp_path / "x.png"), 0).size == (8, 8)


def test_odd_entries_are_no_flood_of_warnings(tmp_path):
    from lavis_dcd.plugins import register_all

    entries = b"".join(struct.pack("<HHII", number, 7, 100_000, 8) for number in range(1000, 3000))
    block = b"II*\0\x08\0\0\0" + struct.pack("<H", 2000) + entries
    (tmp_path / "x.png").write_bytes(png(8, 8, before=chunk(b"eXIf", block)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        load_picture(_set(tmp_path / "x.png"), 0)
        assert len(seen) > 100
        seen.clear()
        register_all()
        load_picture(_set(tmp_path / "x.png"), 0)
    assert seen == []


def test_there_is_one_opener():
    package = Path(opener.__file__).parent.parent
    openers = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open", "read_image")
    }
    assert openers == {"datasets/opener.py"}


def test_a_strip_outside_of_the_file(tmp_path):
    noise(mode="L").save(tmp_path / "x", "TIFF")
    raw = bytearray((tmp_path / "x").read_bytes())
    place = raw.index(struct.pack("<HHI", 273, 4, 1)) if struct.pack("<HHI", 273, 4, 1) in raw else -1
    assert place > 0
    raw[place + 8 : place + 12] = struct.pack("<I", 2**31)
    (tmp_path / "x").write_bytes(raw)
    (line,) = refusals(tmp_path / "x", "full")
    assert "truncated" in line


def test_a_memory_that_does_not_suffice_is_told(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise MemoryError

    noise().save(tmp_path / "x", "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    assert refusals(tmp_path / "x", "full") == {"the memory does not suffice to decode it"}
