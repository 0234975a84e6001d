"""Pictures as a person sees them, for reports and checks."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image


def load_picture(dataset: Any, index: int) -> Image.Image:
    """The unprocessed RGB picture of item `index`.

    Args:
        dataset: one with a method `picture(index)`, or any LAVIS data set of files (`annotation`, `vis_root`).

    Raises:
        OSError: the file is missing or no picture.
    """
    if hasattr(dataset, "picture"):
        return dataset.picture(index)
    with Image.open(os.path.join(dataset.vis_root, dataset.annotation[index]["image"])) as opened:
        return opened.convert("RGB")
