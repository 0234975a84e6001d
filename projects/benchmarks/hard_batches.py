"""What hard batches cost: the neighbours of a training set's pictures, and the order of an epoch made of them.

The vectors are random; a teacher's own encoders, which run once per picture and caption, are not measured. COCO's size
is --pictures 113287 --dim 512; with --part 0.01 neighbours are found for so many of the pictures only, which takes that
share of the time, and the epoch is made of random ones.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from measuring import PeakMemory, in_child, parsed, parser, progress, report
from torch import Tensor, nn

from lavis_dcd.datasets.neighbours import NeighbourTable
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.mining.joint_space import JointSpace, joint_spaces
from lavis_dcd.mining.neighbours import TILE_MB, nearest_of_block, nearest_pictures
from lavis_dcd.mining.pools import Pairing
from lavis_dcd.training.neighbourhoods import Neighbourhoods

T = TypeVar("T")

COLUMNS = {
    "row": "row|s",
    "seconds": "s|,.2f",
    "cpu_seconds": "CPU s|,.2f",
    "extra_mb": "peak MB|,.0f",
    "kept_mb": "kept MB|,.0f",
    "hardest_share": "20 nearest in the batch|.1%",
}
_CLUSTER = 32  # dimensions in which pictures lie near each other
_AT_ONCE = 4096
_NEAREST = 20


class Vectors(nn.Module, Matcher):
    """A dual encoder whose features are its vectors."""

    has_joint_space, family = True, "dual"

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(images)

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        raise NotImplementedError

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        raise NotImplementedError

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return nn.functional.normalize(images.tokens[:, 0], dim=1)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return nn.functional.normalize(texts.tokens[:, 0], dim=1)


class Made:
    """Vectors of pictures and captions, a batch at a time: a caption's is near its picture's."""

    def __init__(self, pictures: int, captions: int, dim: int, seed: int) -> None:
        self.count, self.per_picture, self.seed = pictures, captions, seed
        generator = torch.Generator().manual_seed(seed)
        self.places = torch.randn(pictures, _CLUSTER, generator=generator)
        self.spread = torch.randn(_CLUSTER, dim, generator=generator)

    def pictures(self) -> Iterator[tuple[Tensor, list[ImageFeatures]]]:
        for some in torch.arange(self.count).split(_AT_ONCE):
            yield some, [ImageFeatures((self.places[some] @ self.spread)[:, None])]

    def captions(self) -> Iterator[tuple[Tensor, list[TextFeatures]]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        for some in torch.arange(self.count * self.per_picture).split(_AT_ONCE):
            places = self.places[some // self.per_picture]
            places = places + torch.randn(places.shape, generator=generator)
            yield some, [TextFeatures((places @ self.spread)[:, None])]


def measured(rows: list[dict[str, Any]], name: str, work: Callable[[], T]) -> T:
    """Return what ``work`` returns; its time and memory become a row."""
    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        made = work()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    rows.append({"row": name, "seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mb": memory.extra / 1e6})
    progress(f"{name}: {seconds:.2f} s, {rows[-1]['extra_mb']:,.0f} MB")
    return made


def share_of_nearest(table: NeighbourTable, order: Sequence[int], batch: int) -> float:
    """Return the mean share of a picture's 20 nearest that are in its batch."""
    nearest = table.nearest[:, :_NEAREST].long()
    shares = []
    for start in range(0, len(order) - batch + 1, batch):
        pictures = table.picture_of_row[order[start : start + batch]]
        there = torch.zeros(len(nearest), dtype=torch.bool)
        there[pictures] = True
        shares.append(there[nearest[pictures]].float().mean())
    return float(torch.stack(shares).mean())


def some_neighbours(spaces: list[JointSpace], count: int, part: float, seed: int) -> Tensor:
    """Return random neighbours, int32 ``[P, count]``, once those of a part of the pictures were found in blocks."""
    pictures, block = len(spaces[0]), max(1, TILE_MB * 2**20 // (4 * len(spaces[0])))
    for start in range(0, round(part * pictures), block):
        nearest_of_block(spaces, [1.0], slice(start, min(start + block, pictures)), count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(pictures, (pictures, count), generator=generator, dtype=torch.int32)


def measure(
    pictures: int, captions: int, dim: int, neighbours: int, batch: int, size: int, share: float, part: float, seed: int
) -> list[dict[str, Any]]:
    """The rows of the table; to be called in a process of its own."""
    rows: list[dict[str, Any]] = []
    of_row = torch.arange(pictures).repeat_interleave(captions)
    texts = torch.arange(pictures * captions)
    pairing = Pairing(of_row, texts, torch.arange(pictures) * captions, texts)
    made = Made(pictures, captions, dim, seed)
    spaces = measured(rows, "vectors made and averaged", lambda: joint_spaces([Vectors()], made, pairing))
    rows[-1]["kept_mb"] = 2 * 4 * pictures * dim / 1e6
    if part < 1:
        name = f"neighbours of {part:.1%} of the pictures"
        nearest = measured(rows, name, lambda: some_neighbours(spaces, neighbours, part, seed))
    else:
        nearest, _ = measured(rows, "neighbours", lambda: nearest_pictures(spaces, [1.0], neighbours))
    rows[-1]["kept_mb"] = nearest.nbytes / 1e6
    table = NeighbourTable.of(of_row, nearest)
    generator = torch.Generator().manual_seed(seed)
    how = Neighbourhoods(table, size, share)
    order = measured(rows, "order of an epoch", lambda: how.order(batch, generator))
    exact = part == 1
    rows[-1] |= {"kept_mb": 8 * len(order) / 1e6}
    rows[-1] |= {"hardest_share": share_of_nearest(table, order, batch)} if exact else {}
    order = measured(rows, "random order", lambda: torch.randperm(len(of_row), generator=generator).tolist())
    rows[-1] |= {"kept_mb": 8 * len(order) / 1e6}
    rows[-1] |= {"hardest_share": share_of_nearest(table, order, batch)} if exact else {}
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The script."""
    of = parser(__doc__)
    of.add_argument("--pictures", type=int, default=5000, metavar="N", help="training pictures (default: 5,000)")
    of.add_argument("--captions", type=int, default=5, metavar="N", help="of each picture (default: 5)")
    of.add_argument("--dim", type=int, default=256, metavar="N", help="of the joint space (default: 256)")
    of.add_argument("--neighbours", type=int, default=128, metavar="N", help="run.batches.neighbours (default: 128)")
    of.add_argument("--batch", type=int, default=128, metavar="N", help="pictures of a batch (default: 128)")
    of.add_argument("--size", type=int, metavar="N", help="run.batches.size (default: the batch)")
    of.add_argument("--share", type=float, default=1.0, metavar="F", help="run.batches.share (default: 1)")
    of.add_argument("--part", type=float, default=1.0, metavar="F", help="of the pictures (default: all)")
    options = parsed(of, argv)
    if options.pictures * options.captions < options.batch:
        of.error(f"--pictures: {options.pictures} with {options.captions} captions each make no batch")
    size = options.size or options.batch
    settings = {
        "pictures": options.pictures, "captions": options.pictures * options.captions, "dim": options.dim,
        "neighbours": options.neighbours, "batch": options.batch, "size": size, "share": options.share,
        "part": options.part,
    }  # fmt: skip
    rows = in_child(
        measure, options.pictures, options.captions, options.dim, options.neighbours, options.batch, size,
        options.share, options.part, options.seed,
    )  # fmt: skip
    report("hard_batches", settings, rows, COLUMNS, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
