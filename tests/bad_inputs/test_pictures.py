"""Pictures that are missing, broken or unusual: refused with their names, or read as a viewer shows them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from lavis_dcd.common import regular
from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.opener import formats_read
from lavis_dcd.datasets.pictures import load_picture, verify_pictures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")

WAY = "put them in place or take their rows out of the annotations (run.verify=off skips this check, training then " \
      "fails at the first of them)"  # fmt: skip
NAMES = ", ".join(formats_read().values())
UNKNOWN = f"no picture of a format that is read ({NAMES}); save it as one of them"


def _set(root: Path, *names: str) -> SimpleNamespace:
    return SimpleNamespace(vis_root=str(root), annotation=[{"image": name} for name in names])


def _noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def _cut(file: Path) -> None:
    _noise().save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-900])


def _cut_png(file: Path) -> None:
    _noise().save(file, "PNG")
    file.write_bytes(file.read_bytes()[:2000])


def _bomb(file: Path) -> None:
    """A PNG of 90 bytes that claims 400 million pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def _floats(file: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(file, "TIFF")


def _integers(file: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.int32)).save(file, "TIFF")


RANGELESS = "32 bits a value, whose range nothing tells; save it with 8 or 16 bits"
BOMB = f"more than {2 * Image.MAX_IMAGE_PIXELS} pixels, which may be an attack on memory; make it smaller"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, "missing"),
    "folder": (Path.mkdir, "it is a folder"),
    "empty": (Path.touch, "the file is empty"),
    "text": (lambda file: file.write_text("no picture"), UNKNOWN),
    "html": (
        lambda file: file.write_text("<html>404 Not Found</html>"),
        f"HTML, none of the formats that are read ({NAMES}); save it as one of them",
    ),
    "zeros": (lambda file: file.write_bytes(bytes(5000)), UNKNOWN),
    "only a PNG's first bytes": (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n"), UNKNOWN),
    "bomb": (_bomb, BOMB),
    "floats": (_floats, RANGELESS),
    "32-bit integers": (_integers, RANGELESS),
}
CUT = {
    "cut JPEG": (_cut, "image file is truncated (0 bytes not processed)"),
    "cut PNG": (_cut_png, "image file is truncated"),
}


@pytest.mark.parametrize("mode", ["fast", "full"])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_found_at_the_start(tmp_path, name, mode):
    make, reason = BROKEN[name]
    make(tmp_path / "x.jpg")
    with pytest.raises(UserError) as caught:
        verify_pictures(_set(tmp_path, "x.jpg"), mode)
    reason = reason if reason == "missing" else f"no readable picture ({reason})"
    assert caught.value.faults == [f"{tmp_path}/x.jpg: {reason}", f"1 of 1 pictures cannot be read: {WAY}"]


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", [*BROKEN, *CUT])
def test_broken_files_stop_training_with_their_names(tmp_path, name, lenient, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # importing lavis switches it on
    make, reason = (BROKEN | CUT)[name]
    make(tmp_path / "x.jpg")
    with pytest.raises(UserError) as caught:
        load_picture(_set(tmp_path, "x.jpg"), 0)
    line = f"{tmp_path}/x.jpg: no readable picture ({reason}); run.verify=full finds all such files"
    if name in CUT:  # how many bytes are left over is PIL's matter
        assert caught.value.faults[0].startswith(line.partition(" (0")[0].partition("); run")[0])
        assert caught.value.faults[0].endswith("; run.verify=full finds all such files")
    else:
        assert caught.value.faults == [line]
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


@pytest.mark.parametrize("name", CUT)
def test_files_cut_short_are_found_by_the_full_check(tmp_path, name):
    CUT[name][0](tmp_path / "x.jpg")
    with pytest.raises(UserError) as caught:
        verify_pictures(_set(tmp_path, "x.jpg"), "full")
    assert caught.value.faults[0].startswith(f"{tmp_path}/x.jpg: no readable picture (image file is truncated")
    assert caught.value.faults[1] == f"1 of 1 pictures cannot be read: {WAY}"


@pytest.mark.usefixtures("permissions_count")
def test_no_permission(tmp_path):
    _noise().save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(UserError) as caught:
        verify_pictures(_set(tmp_path, "x.png"))
    assert caught.value.faults[0] == f"{tmp_path}/x.png: no readable picture (no permission to read it)"


def test_no_permission_as_the_system_tells_it(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

    _noise().save(tmp_path / "x.png")
    monkeypatch.setattr(regular.os, "open", refuse)
    with pytest.raises(UserError) as caught:
        verify_pictures(_set(tmp_path, "x.png"))
    assert caught.value.faults[0] == f"{tmp_path}/x.png: no readable picture (no permission to read it)"


def test_a_name_with_a_line_break_stays_on_its_line(tmp_path):
    with pytest.raises(UserError) as caught:
        verify_pictures(_set(tmp_path, "a\nb.jpg"))
    assert caught.value.faults[0] == rf"{tmp_path}/a\nb.jpg: missing"


# -- unusual, and read -------------------------------------------------------------------------------------------


def _read(folder: Path, name: str) -> np.ndarray:
    verify_pictures(_set(folder, name), "full")
    picture = load_picture(_set(folder, name), 0)
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled_not_clipped(tmp_path, kind):
    values = np.array([[0, 128, 129, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x", kind)
    expected = [0, 0, 1, 1, 128, 255]  # round(value / 257)
    assert _read(tmp_path, "x").tolist() == [[[value] * 3 for value in expected]]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "x.tif")
    assert _read(tmp_path, "x.tif").tolist() == [[[255, 0, 0]] * 2] * 2
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    assert np.abs(_read(tmp_path, "x.jpg").astype(int) - [255, 0, 0]).max() <= 3


def test_a_palette_is_looked_up_and_its_transparent_colour_is_white(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=2)
    assert _read(tmp_path, "opaque.png").tolist() == [[[255, 0, 0], [0, 0, 255], [9, 9, 9]]]
    assert _read(tmp_path, "clear.png").tolist() == [[[255, 0, 0], [0, 0, 255], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(tmp_path, mode):
    alpha = [255, 0, 51]  # opaque, clear, a fifth
    pixels = [(0, 0, 0, a) if mode == "RGBA" else (0, a) for a in alpha]
    picture = Image.new(mode, (3, 1))
    picture.putdata(pixels)
    picture.save(tmp_path / "x.png")
    assert _read(tmp_path, "x.png").tolist() == [[[0] * 3, [255] * 3, [204] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x", kind, save_all=True, append_images=frames[1:], lossless=True)
    assert (_read(tmp_path, "x") == [255, 0, 0]).all()


# where the EXIF entry puts the stored rows and columns (its values 1 to 8)
TURNED = {
    1: [[1, 2, 3], [4, 5, 6]], 2: [[3, 2, 1], [6, 5, 4]], 3: [[6, 5, 4], [3, 2, 1]], 4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]], 6: [[4, 1], [5, 2], [6, 3]], 7: [[6, 3], [5, 2], [4, 1]], 8: [[3, 6], [2, 5], [1, 4]],
    99: [[1, 2, 3], [4, 5, 6]],
}  # fmt: skip


@pytest.mark.parametrize("value", TURNED)
def test_photographs_stand_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)).save(tmp_path / "x.png", exif=exif)
    assert _read(tmp_path, "x.png")[:, :, 0].tolist() == TURNED[value]


def test_a_damaged_exif_block_spoils_no_picture(tmp_path):
    _noise().save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert (_read(tmp_path, "x.png") == np.asarray(_noise())).all()


def test_one_bit_and_one_pixel(tmp_path):
    Image.new("1", (1, 1), 1).save(tmp_path / "x.png")
    assert _read(tmp_path, "x.png").tolist() == [[[255] * 3]]


def test_a_name_that_lies_about_the_format(tmp_path):
    _noise().save(tmp_path / "x.jpg", "PNG")
    assert (_read(tmp_path, "x.jpg") == np.asarray(_noise())).all()


@pytest.mark.parametrize("seed", range(40))
def test_scrambled_files_give_a_picture_or_a_fault(tmp_path, seed):
    draw = np.random.default_rng(seed)
    kind = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO")[seed % 8]
    _noise(32).save(tmp_path / "x", kind)
    raw = bytearray((tmp_path / "x").read_bytes())
    for at in draw.integers(0, min(len(raw), 400), 8):
        raw[at] = draw.integers(256)
    (tmp_path / "x").write_bytes(raw[: draw.integers(1, len(raw) + 1)])
    try:
        assert load_picture(_set(tmp_path, "x"), 0).mode == "RGB"
    except UserError as error:
        assert error.faults[0].startswith(f"{tmp_path}/x: no readable picture (") and "\n" not in error.faults[0]
