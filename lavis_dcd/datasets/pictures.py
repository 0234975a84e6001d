"""Pictures as a person sees them, for reports and checks."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image


def load_picture(dataset: Any, index: int, side: int | None = None) -> Image.Image:
    """The unprocessed RGB picture of item `index`.

    Args:
        dataset: one with a method `picture(index)`, or any LAVIS data set of files (`annotation`, `vis_root`).
        side: for thumbnails of so many pixels. A JPEG is then decoded at a scale that leaves twice as many, a third
            of the time for large photographs. After shrinking, pixels differ by 0.4 of 255 on average (5 at most);
            at 384 px, what a model would read differs by up to 11, so models never read such pictures.

    Raises:
        OSError: the file is missing or no picture.
    """
    if hasattr(dataset, "picture"):
        return dataset.picture(index)
    with Image.open(os.path.join(dataset.vis_root, dataset.annotation[index]["image"])) as opened:
        if side is not None:
            opened.draft("RGB", (2 * side, 2 * side))
        return opened.convert("RGB")
