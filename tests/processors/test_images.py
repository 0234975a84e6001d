from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_dcd.common.errors import UserError
from lavis_dcd.processors import images

EVAL, TRAIN = "dcd_image_eval", "dcd_image_train"
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}  # values stay in [0, 1]


def processor(kind: str, **keys):
    cls = {EVAL: images.DcdImageEvalProcessor, TRAIN: images.DcdImageTrainProcessor}[kind]
    return cls.from_config({"name": kind, **keys})


def halves(width: int, height: int) -> Image.Image:
    """The left half red, the right half blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("kind", [EVAL, TRAIN])
def test_a_picture_becomes_a_square_float_tensor_384_by_default(kind):
    made = processor(kind)(halves(20, 10))
    assert made.shape == (3, 384, 384)
    assert made.dtype == torch.float32


def test_values_are_normalised_per_channel():
    pixel = Image.new("RGB", (8, 8), (255, 51, 0))
    made = processor(EVAL, image_size=8, mean=[0.5, 0.2, 0.0], std=[0.5, 0.1, 0.25])(pixel)
    expected = torch.tensor([(1.0 - 0.5) / 0.5, (0.2 - 0.2) / 0.1, 0.0])
    assert torch.allclose(made, expected[:, None, None].expand(3, 8, 8), atol=1e-6)
    by_default = processor(EVAL, image_size=8)(pixel)[:, 0, 0]
    values = zip((1.0, 0.2, 0.0), images.CLIP_MEAN, images.CLIP_STD, strict=True)
    assert torch.allclose(by_default, torch.tensor([(v - m) / s for v, m, s in values]), atol=1e-6)


def test_squash_keeps_the_whole_picture_and_crop_its_middle():
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 20, 10))  # the middle third
    squashed = processor(EVAL, image_size=9, interpolation="nearest", **PLAIN)(wide)
    assert squashed[0, 0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    cropped = processor(EVAL, image_size=10, resize="crop", interpolation="nearest", **PLAIN)(wide)
    assert bool((cropped == 1).all())


@pytest.mark.parametrize("kind", [EVAL, TRAIN])
def test_a_picture_is_not_scaled_to_millions_of_pixels_to_be_cut(kind):
    narrow = Image.new("L", (1, 65535))
    crop = processor(kind, image_size=64, resize="crop")
    with pytest.raises(UserError) as caught:
        crop(narrow)
    assert caught.value.faults == [
        "a picture of 1 x 65535 pixels would be scaled to 4194240 x 64, to be cut to a square: use resize: squash, a "
        "smaller image_size than 64, or take it out of the annotations"
    ]
    assert crop(Image.new("RGB", (2, 400))).shape == (3, 64, 64)  # the proportions that picture files may have
    assert processor(kind, image_size=64)(narrow.convert("RGB")).shape == (3, 64, 64)


def test_interpolation_changes_the_pixels():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    made = [
        processor(EVAL, image_size=7, interpolation=name, **PLAIN)(noise)
        for name in ("nearest", "bilinear", "bicubic", "lanczos")
    ]
    assert all(not torch.equal(made[i], made[j]) for i in range(4) for j in range(i))


def test_without_augmentation_training_and_evaluation_see_the_same():
    picture = halves(20, 12)
    assert torch.equal(processor(TRAIN, image_size=16)(picture), processor(EVAL, image_size=16)(picture))


def test_flip_mirrors_about_half_of_the_pictures_and_changes_nothing_else():
    picture, plain = halves(16, 16), processor(EVAL, image_size=16)
    straight = plain(picture)
    mirrored = straight.flip(-1)
    torch.manual_seed(0)
    train = processor(TRAIN, image_size=16, augment="flip")
    made = [train(picture) for _ in range(40)]
    flipped = sum(torch.equal(m, mirrored) for m in made)
    assert flipped + sum(torch.equal(m, straight) for m in made) == 40
    assert 8 <= flipped <= 32


def test_randaugment_varies_and_follows_the_seed():
    train = processor(TRAIN, image_size=16, augment="randaugment", randaugment_magnitude=20)
    picture = halves(32, 32)

    def draw() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [train(picture) for _ in range(6)]

    one, two = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a, one[0]) for a in one[1:])
    assert all(a.shape == (3, 16, 16) for a in one)


@pytest.mark.parametrize(
    ("kind", "keys", "line"),
    [
        (EVAL, {"image_sizes": 224}, "vis_processor.image_sizes: unknown key; did you mean image_size"),
        (EVAL, {"augment": "flip"}, "vis_processor.augment: unknown key"),
        (EVAL, {"image_size": 0}, "vis_processor: image_size: 0 is not positive"),
        (EVAL, {"image_size": 4097}, "vis_processor: image_size: 4097 is more than 4096"),
        (EVAL, {"image_size": "big"}, "vis_processor.image_size: 'big' (text) is not an integer"),
        (EVAL, {"std": [0.5, 0.0, 0.5]}, "vis_processor: std: [0.5, 0.0, 0.5] must be positive"),
        (EVAL, {"mean": [0.5]}, "vis_processor.mean: [0.5] has 1 items, expected 3"),
        (EVAL, {"resize": "pad"}, "vis_processor.resize: 'pad' is not one of squash, crop"),
        (EVAL, {"interpolation": "bicubik"}, "vis_processor.interpolation: 'bicubik' is not one of nearest,"),
        (TRAIN, {"augment": "mixup"}, "vis_processor.augment: 'mixup' is not one of none, flip, randaugment"),
        (TRAIN, {"randaugment_ops": 0}, "vis_processor: randaugment_ops: 0 is not positive"),
        (TRAIN, {"randaugment_magnitude": 31}, "vis_processor: randaugment_magnitude: 31 is not between 0 and 30"),
    ],
)
def test_a_wrong_key_or_value_is_told(kind, keys, line):
    with pytest.raises(UserError) as caught:
        processor(kind, **keys)
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(line)


def test_lavis_finds_them_by_name():
    from lavis.common.registry import registry

    assert registry.get_processor_class(EVAL) is images.DcdImageEvalProcessor
    assert registry.get_processor_class(TRAIN) is images.DcdImageTrainProcessor
