from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.datasets.pictures import load_picture


def test_a_set_that_makes_its_pictures_is_asked_for_them():
    made = Image.new("RGB", (3, 2))
    assert load_picture(SimpleNamespace(picture=lambda index: (made, index)), 7) == (made, 7)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_files_come_as_rgb_whatever_their_mode(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(tmp_path / name)
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "none.png"}, {"image": name}])
    picture = load_picture(dataset, 1)
    assert (picture.mode, picture.size) == ("RGB", (5, 4))


def test_a_missing_or_broken_file_is_a_fault_of_its_name(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "none.png"}, {"image": "broken.png"}])
    for index in range(2):
        with pytest.raises(UserError, match=r"(none|broken)\.png: no readable picture"):
            load_picture(dataset, index)


def test_thumbnails_of_large_photographs_are_decoded_at_a_smaller_scale(tmp_path):
    rows, columns = np.mgrid[:900, :1200]
    waves = [127.5 + 127.5 * np.sin(rows / 90 + columns / period) for period in (50, 70, 110)]
    Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).save(tmp_path / "a.jpg", quality=92)
    Image.new("L", (1200, 900)).save(tmp_path / "b.png")
    dataset = SimpleNamespace(vis_root=str(tmp_path), annotation=[{"image": "a.jpg"}, {"image": "b.png"}])
    whole, scaled = load_picture(dataset, 0), load_picture(dataset, 0, side=160)
    assert whole.size == (1200, 900) and scaled.size == (600, 450) and scaled.mode == "RGB"
    assert load_picture(dataset, 1, side=160).size == (1200, 900)  # other formats have no scales
    for picture in (whole, scaled):
        picture.thumbnail((160, 160))
    assert np.abs(np.asarray(whole, float) - np.asarray(scaled, float)).max() <= 5
