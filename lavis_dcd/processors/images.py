"""`dcd_image_train` and `dcd_image_eval`: a picture becomes a normalised tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from typing_extensions import Self

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.schema import parse

MOST_SIDE = 4096  # pixels of a side that is asked for
MOST_RESIZED = 178_956_970  # pixels of a resized picture, before it is cut

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class AugmentationConfig:
    """Keys of a `vis_processor` for training, beside those of its evaluation; a base beside theirs.

    Args:
        augment: "none"; "flip" mirrors every second picture (wrong where captions say left and right);
            "randaugment" is torchvision's RandAugment, before the resizing.
        randaugment_ops, randaugment_magnitude: its operations per picture and their strength (0-30).
    """

    augment: Literal["none", "flip", "randaugment"] = "none"
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # the evaluation's keys, a base beside this one, have it
        if self.randaugment_ops < 1:
            raise ValueError(f"randaugment_ops: {self.randaugment_ops} is not positive")
        if not 0 <= self.randaugment_magnitude <= 30:
            raise ValueError(f"randaugment_magnitude: {self.randaugment_magnitude} is not between 0 and 30")

    def transforms(self) -> list[Callable]:
        """PIL picture -> PIL picture, none or one of them."""
        if self.augment == "flip":
            return [transforms.RandomHorizontalFlip()]
        if self.augment == "randaugment":
            return [
                transforms.RandAugment(
                    self.randaugment_ops, self.randaugment_magnitude, interpolation=InterpolationMode.BILINEAR
                )
            ]
        return []


class PictureProcessor(BaseProcessor):
    """A LAVIS picture processor that is built from a dataclass."""

    config_class: ClassVar[type]

    def __init__(self, config: Any) -> None:
        super().__init__()

    @classmethod
    def config_schema(cls) -> type:
        """Return the dataclass that a section must fit."""
        return cls.config_class

    @classmethod
    def from_config(cls, cfg: Any = None) -> Self:
        """Build from a `vis_processor` section.

        Raises:
            UserError: one line per unknown key or wrong value.
        """
        return cls(parse(cls.config_class, cfg, "vis_processor"))


def check_scaled(width: int, height: int, side: int) -> None:
    """Check what a picture becomes whose shorter side is scaled to ``side``.

    Raises:
        UserError: more than `MOST_RESIZED` pixels.
    """
    longer = side * max(width, height) // max(1, min(width, height))
    if side * longer > MOST_RESIZED:
        raise UserError(
            f"a picture of {width} x {height} pixels would be scaled to {longer} x {side}, to be cut to a square: "
            f"use resize: squash, a smaller image_size than {side}, or take it out of the annotations"
        )


@dataclass(frozen=True)
class ImageConfig:
    """Keys of `dcd_image_eval`.

    Args:
        name: LAVIS's processor name.
        image_size: side of the square result in pixels, at most 4096.
        mean, std: per channel, on values in [0, 1]; CLIP's.
        interpolation: of the resizing.
        resize: "squash" gives the whole picture, its proportions lost (as METER does); "crop" scales the shorter
            side and cuts the middle out.
    """

    name: str = ""
    image_size: int = 384
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    resize: Literal["squash", "crop"] = "squash"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size: {self.image_size} is not positive")
        if self.image_size > MOST_SIDE:
            raise ValueError(f"image_size: {self.image_size} is more than {MOST_SIDE}")
        if min(self.std) <= 0:
            raise ValueError(f"std: {list(self.std)} must be positive")


@dataclass(frozen=True)
class TrainImageConfig(AugmentationConfig, ImageConfig):
    """Keys of `dcd_image_train`: those of `dcd_image_eval` and the augmentation's."""


class _ImageProcessor(PictureProcessor):
    # Reads fully decoded pictures: of JPEGs decoded at half scale or less, results differ by up to 11 of 255 (0.5 on
    # average; 20 photographs of 896 px, to 384 px).

    def __init__(self, config: ImageConfig) -> None:
        super().__init__(config)
        augmentation = config.transforms() if isinstance(config, AugmentationConfig) else []
        self.transform = transforms.Compose([*augmentation, *_to_tensor(config)])
        self._scaled_side = config.image_size if config.resize == "crop" else None

    def __call__(self, item: Image.Image) -> torch.Tensor:
        """PIL picture -> FloatTensor [3, image_size, image_size].

        Raises:
            UserError: a picture so narrow that it would be scaled to more pixels than memory should hold.
        """
        if self._scaled_side is not None:
            check_scaled(*item.size, self._scaled_side)
        return self.transform(item)


@registry.register_processor("dcd_image_eval")
class DcdImageEvalProcessor(_ImageProcessor):
    """Resize, to tensor, normalise. Keys: `ImageConfig`."""

    config_class = ImageConfig


@registry.register_processor("dcd_image_train")
class DcdImageTrainProcessor(_ImageProcessor):
    """Augment, resize, to tensor, normalise. Keys: `TrainImageConfig`."""

    config_class = TrainImageConfig


def _to_tensor(config: ImageConfig) -> list[Callable]:
    size, mode = config.image_size, InterpolationMode(config.interpolation)
    if config.resize == "squash":
        resize = [transforms.Resize((size, size), interpolation=mode)]
    else:
        resize = [transforms.Resize(size, interpolation=mode), transforms.CenterCrop(size)]
    return [*resize, transforms.ToTensor(), transforms.Normalize(config.mean, config.std)]
