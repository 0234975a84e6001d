"""`shape_scenes`: a data set that the package draws itself, as LAVIS data sets and a builder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from PIL import Image
from typing_extensions import override

from lavis_dcd.common.files import packaged_folder
from lavis_dcd.datasets.builder import RetrievalBuilder
from lavis_dcd.datasets.rows import RetrievalEvalRows, RetrievalRows
from lavis_dcd.datasets.shape_scenes.captions import SceneIndex, write_captions
from lavis_dcd.datasets.shape_scenes.drawing import draw_scene
from lavis_dcd.datasets.shape_scenes.scenes import MOST_SCENES, SplitScenes, make_splits

CAPTIONS_PER_SCENE = 5


@dataclass(frozen=True)
class SceneCounts:
    """Scenes per split."""

    train: int = 3000  # scenes to train on
    val: int = 300  # scenes to validate on
    test: int = 300  # scenes to test on

    def __post_init__(self) -> None:
        for split, count in vars(self).items():
            if count < 1:
                raise ValueError(f"{split}: {count} scenes, at least 1 is needed")
        if sum(vars(self).values()) > MOST_SCENES:
            raise ValueError(f"{sum(vars(self).values())} scenes in all, at most {MOST_SCENES} can be drawn")


@dataclass(frozen=True)
class ShapeScenesInfo:
    """`build_info` of `shape_scenes`.

    Args:
        seed: the same seed draws the same scenes, pictures and captions everywhere.
        image_size: side of the pictures in pixels.
        scenes: how many per split.
    """

    seed: int = 0
    image_size: int = 64
    scenes: SceneCounts = field(default_factory=SceneCounts)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative")
        if not 24 <= self.image_size <= 512:
            raise ValueError(f"image_size: {self.image_size} is not between 24 and 512")


@dataclass(frozen=True)
class DrawnSplit:
    """One split: `pictures` uint8 [scenes, side, side, 3], `captions` per scene, and the scenes' names and families."""

    pictures: np.ndarray
    captions: list[list[str]]
    names: list[str]
    families: list[int]


def draw_splits(info: ShapeScenesInfo) -> dict[str, DrawnSplit]:
    """Draw and word the whole data set: about 4 s for the default size."""
    splits = make_splits(vars(info.scenes), info.seed)
    return {name: _draw_split(split, info) for name, split in splits.items()}


def _draw_split(split: SplitScenes, info: ShapeScenesInfo) -> DrawnSplit:
    index = SceneIndex(split.scenes)
    pictures = np.empty((len(split.scenes), info.image_size, info.image_size, 3), np.uint8)
    captions = []
    for row, scene in enumerate(split.scenes):
        # Every scene has its own streams: nothing depends on the order of drawing.
        number = split.first + row
        pictures[row] = draw_scene(scene, info.image_size, np.random.default_rng([info.seed, 12, number]))
        words = np.random.default_rng([info.seed, 13, number])
        captions.append([c.text for c in write_captions(scene, index, CAPTIONS_PER_SCENE, words)])
    return DrawnSplit(pictures, captions, split.names, split.families)


class _DrawnPictures:
    """Items whose picture comes from memory; `annotation[index]["scene"]` is its row in `pictures`."""

    pictures: np.ndarray
    annotation: list[dict[str, Any]]

    def picture(self, index: int) -> Image.Image:
        """The picture of item `index`, unprocessed."""
        return Image.fromarray(self.pictures[self.annotation[index]["scene"]])


class ShapeScenesDataset(_DrawnPictures, RetrievalRows):
    """The training scenes: one row per caption; items as in `RetrievalRows`. Rows also hold "family" (int)."""

    def __init__(self, vis_processor: BaseProcessor, text_processor: BaseProcessor, drawn: DrawnSplit) -> None:
        rows = [row | {"caption": caption} for row in _rows(drawn) for caption in row["caption"]]
        super().__init__(vis_processor, text_processor, "", rows)
        self.pictures = drawn.pictures


class ShapeScenesEvalDataset(_DrawnPictures, RetrievalEvalRows):
    """The validation or test scenes: one row per scene; items and tables as in `RetrievalEvalRows`."""

    def __init__(self, vis_processor: BaseProcessor, text_processor: BaseProcessor, drawn: DrawnSplit) -> None:
        super().__init__(vis_processor, text_processor, "", _rows(drawn))
        self.pictures = drawn.pictures


def _rows(drawn: DrawnSplit) -> list[dict[str, Any]]:
    parts = zip(drawn.names, drawn.captions, drawn.families, strict=True)
    return [
        {"image": name, "caption": captions, "image_id": name, "family": family, "scene": scene}
        for scene, (name, captions, family) in enumerate(parts)
    ]


@registry.register_builder("shape_scenes")
class ShapeScenesBuilder(RetrievalBuilder):
    """Builds {"train", "val", "test"} from `build_info`, see `ShapeScenesInfo`."""

    name = "shape_scenes"
    info_class = ShapeScenesInfo
    train_dataset_cls = ShapeScenesDataset
    eval_dataset_cls = ShapeScenesEvalDataset
    DATASET_CONFIG_DICT = {"default": str(packaged_folder("configs") / "datasets/shape_scenes/defaults.yaml")}  # noqa: RUF012

    @override
    def read(self, info: ShapeScenesInfo) -> dict[str, tuple[DrawnSplit]]:
        return {split: (drawn,) for split, drawn in draw_splits(info).items()}
