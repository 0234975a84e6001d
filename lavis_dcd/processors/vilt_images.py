"""`vilt_image_train` and `vilt_image_eval`: a picture keeps its proportions, and lies padded on a fixed canvas."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lavis.common.registry import registry
from PIL import Image
from torch.nn import functional as nnf
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode, normalize, resize, to_tensor

from lavis_dcd.processors.images import MOST_SIDE, AugmentationConfig, PictureProcessor

# ViLT's; with them no pixel of 8 bits becomes 0, which is how the model tells padding
MEAN = STD = (0.5, 0.5, 0.5)
_LONGEST = 1333 / 800  # ViLT's limit of the longer side, in shorter sides


@dataclass(frozen=True)
class ViltImageKeys:
    """Keys of `vilt_image_eval`.

    Args:
        name: LAVIS's processor name.
        shorter: length of the shorter side in pixels, before rounding down to `multiple`.
        longer: limit of the longer side; the shorter side gives way. Null: 1333/800 of `shorter`, as ViLT (639 px
            for 384, of which rounding leaves 608).
        multiple: sides are rounded down to multiples of it, the model's patch size.
        pad: put zeros on the right and below up to a square of the longest side there can be, so that pictures of
            different shapes stack to a batch.
    """

    name: str = ""
    shorter: int = 384
    longer: int | None = None
    multiple: int = 32
    pad: bool = True

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise ValueError(f"multiple: {self.multiple} is not positive")
        if self.shorter < self.multiple:
            raise ValueError(f"shorter: {self.shorter} is less than multiple {self.multiple}")
        if self.longer is not None and self.longer < self.shorter:
            raise ValueError(f"longer: {self.longer} is less than shorter {self.shorter}")
        if self.limit > MOST_SIDE:
            raise ValueError(f"the longer side may have {self.limit} pixels, which is more than {MOST_SIDE}")

    @property
    def limit(self) -> int:
        """The longer side's limit in pixels."""
        return int(_LONGEST * self.shorter) if self.longer is None else self.longer

    @property
    def canvas(self) -> int:
        """The side of the padded square: the longest side there can be."""
        return self.limit // self.multiple * self.multiple


@dataclass(frozen=True)
class ViltTrainImageKeys(AugmentationConfig, ViltImageKeys):
    """Keys of `vilt_image_train`: those of `vilt_image_eval` and the augmentation's."""


def fitted_size(width: int, height: int, shorter: int, longer: int, multiple: int) -> tuple[int, int]:
    """Height and width that a picture is resized to.

    ViLT's rule (its `MinMaxResize`): the shorter side becomes `shorter`; where the longer would then exceed
    `longer`, both shrink until it does not; sides are rounded, then rounded down to `multiple`. A side never
    shrinks to nothing: it keeps one `multiple`.
    """
    sides = [height, width]
    short = 1 if height >= width else 0  # of equal sides either
    scale = shorter / sides[short]
    scaled = [side * scale for side in sides]
    scaled[short] = shorter
    if max(scaled) > longer:
        shrink = longer / max(scaled)
        scaled = [side * shrink for side in scaled]
    rounded = [int(side + 0.5) // multiple * multiple for side in scaled]
    return max(multiple, rounded[0]), max(multiple, rounded[1])


class _ViltImageProcessor(PictureProcessor):
    def __init__(self, config: ViltImageKeys) -> None:
        super().__init__(config)
        self.config = config
        augmentation = config.transforms() if isinstance(config, AugmentationConfig) else []
        self.transform = transforms.Compose(augmentation)

    def __call__(self, item: Image.Image) -> torch.Tensor:
        """PIL picture -> FloatTensor [3, H, W]; with `pad`, H = W = `canvas`, zeros right of and below the picture."""
        config = self.config
        size = fitted_size(*item.size, config.shorter, config.limit, config.multiple)
        resized = resize(self.transform(item), list(size), InterpolationMode.BICUBIC)
        made = normalize(to_tensor(resized), MEAN, STD)
        if not config.pad:
            return made
        return nnf.pad(made, (0, config.canvas - size[1], 0, config.canvas - size[0]))


@registry.register_processor("vilt_image_eval")
class ViltImageEvalProcessor(_ViltImageProcessor):
    """Resize, to tensor, normalise, pad. Keys: `ViltImageKeys`."""

    config_class = ViltImageKeys


@registry.register_processor("vilt_image_train")
class ViltImageTrainProcessor(_ViltImageProcessor):
    """Augment, resize, to tensor, normalise, pad. Keys: `ViltTrainImageKeys`."""

    config_class = ViltTrainImageKeys
