"""Training sets in memory of this package's own class, hence of LAVIS's (``stubs`` does without LAVIS)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lavis_dcd.datasets.rows import RetrievalRows


class NumberedRows(RetrievalRows):
    """Rows whose picture is its number in a ``[3, 1, 1]`` tensor; ``decoded`` lists the rows read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.decoded = [*getattr(self, "decoded", []), index]
        row = self.annotation[index]
        number = self.img_ids[row["image_id"]]
        return {
            "image": self.picture(number),
            "text_input": self.text_processor(row["caption"]),
            "image_id": number,
            "instance_id": row["instance_id"],
        }

    def picture(self, number: int) -> Any:
        return torch.full((3, 1, 1), float(number))


def captioned(
    *captions: int,
    name: str = "p",
    cls: type[RetrievalRows] = NumberedRows,
    text: Callable[[str], str] = str.upper,
) -> RetrievalRows:
    """A training set; picture i has ``captions[i]`` captions, "p0 says 1" and so on."""
    rows = [
        {"image": f"{name}{i}.jpg", "caption": f"{name}{i} says {j}", "image_id": f"{name}{i}"}
        for i, count in enumerate(captions)
        for j in range(count)
    ]
    return cls(lambda picture: picture, text, "", rows)
