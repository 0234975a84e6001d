"""What picture processors for training share: random changes before the resizing, and their keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lavis.processors.base_processor import BaseProcessor
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from typing_extensions import Self

from lavis_dcd.common.schema import parse


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
        super().__post_init__()  # type: ignore[misc]  of the evaluation's keys
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
    def from_config(cls, cfg: Any = None) -> Self:
        """Build from a `vis_processor` section.

        Raises:
            UserError: one line per unknown key or wrong value.
        """
        return cls(parse(cls.config_class, cfg, "vis_processor"))
