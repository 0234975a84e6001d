from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import default_collate
from transformers.models.vilt.image_processing_vilt import get_resize_output_image_size

from lavis_dcd.common.errors import UserError
from lavis_dcd.processors import vilt_images
from lavis_dcd.processors.vilt_images import fitted_size

EVAL, TRAIN = "vilt_image_eval", "vilt_image_train"
side = st.integers(1, 4000)


def processor(kind: str, **keys):
    cls = {EVAL: vilt_images.ViltImageEvalProcessor, TRAIN: vilt_images.ViltImageTrainProcessor}[kind]
    return cls.from_config({"name": kind, **keys})


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@settings(deadline=None, max_examples=300)
@given(width=side, height=side)
def test_sides_are_multiples_within_the_limits_and_keep_the_proportions(width, height):
    made_height, made_width = fitted_size(width, height, 384, 639, 32)
    assert made_height % 32 == made_width % 32 == 0
    assert 32 <= min(made_height, made_width) <= 384
    assert max(made_height, made_width) <= 608
    # undone, the rounding (up to one multiple a side, half a pixel more) explains all that the proportions lost
    scale = min(384 / min(width, height), 639 / max(width, height))
    for made, given_side in ((made_height, height), (made_width, width)):
        assert abs(made - scale * given_side) <= 32.5


@settings(deadline=None, max_examples=300)
@given(width=side, height=side, shorter=st.sampled_from([64, 224, 384, 800]))
def test_sizes_are_those_of_the_hub_s_processor(width, height, shorter):
    longer = int(1333 / 800 * shorter)
    expected = get_resize_output_image_size(np.broadcast_to(0, (3, height, width)), shorter, longer, 32)
    # a side that theirs rounds to nothing keeps one multiple
    assert fitted_size(width, height, shorter, longer, 32) == tuple(max(32, s) for s in expected)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (384, 512)), ((480, 640), (512, 384)), ((500, 500), (384, 384)), ((1000, 400), (256, 608))],
)
def test_sizes_worked_out_by_hand(size, expected):
    assert fitted_size(*size, 384, 639, 32) == expected


def test_a_picture_lies_at_the_upper_left_of_a_canvas_of_zeros():
    picture = noise(640, 480)
    padded, bare = processor(EVAL)(picture), processor(EVAL, pad=False)(picture)
    assert padded.shape == (3, 608, 608)
    assert padded.dtype == torch.float32
    assert bare.shape == (3, 384, 512)
    assert torch.equal(padded[:, :384, :512], bare)
    assert bool((bare != 0).all())
    assert float(padded.abs().sum()) == pytest.approx(float(bare.abs().sum()), rel=1e-5)


def test_pixels_are_the_bicubic_ones_between_minus_one_and_one():
    picture = noise(70, 100)
    expected = np.asarray(picture.resize((64, 64), Image.BICUBIC), np.float32) / 255 * 2 - 1
    made = processor(EVAL, shorter=64, pad=False)(picture)
    torch.testing.assert_close(made.permute(1, 2, 0), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_pictures_of_any_shape_stack_to_a_batch():
    make = processor(EVAL, shorter=64)
    batch = default_collate([make(noise(*size)) for size in ((100, 80), (30, 200), (64, 64), (300, 2))])
    assert batch.shape == (4, 3, 96, 96)


def test_another_patch_size_and_limit():
    made = processor(EVAL, shorter=64, longer=100, multiple=16)(noise(200, 100))
    assert made.shape == (3, 96, 96)
    used = (made != 0).any(dim=0)
    assert (int(used.any(dim=1).sum()), int(used.any(dim=0).sum())) == (48, 96)


def test_without_augmentation_training_and_evaluation_see_the_same():
    picture = noise(40, 30)
    assert torch.equal(processor(TRAIN, shorter=32)(picture), processor(EVAL, shorter=32)(picture))


def test_flip_mirrors_the_picture_and_not_its_canvas():
    picture = noise(64, 32)
    plain = processor(EVAL, shorter=32, longer=64, pad=False)
    bare, mirrored = plain(picture), plain(picture.transpose(Image.FLIP_LEFT_RIGHT))
    assert bare.shape == (3, 32, 64)
    torch.manual_seed(0)
    train = processor(TRAIN, shorter=32, longer=64, augment="flip")
    height, width = bare.shape[1:]
    made = [train(picture)[:, :height, :width] for _ in range(40)]
    flipped = sum(torch.equal(m, mirrored) for m in made)
    assert flipped + sum(torch.equal(m, bare) for m in made) == 40
    assert 8 <= flipped <= 32


def test_randaugment_varies_follows_the_seed_and_leaves_no_pixel_at_zero():
    train = processor(TRAIN, shorter=32, augment="randaugment", randaugment_magnitude=20, pad=False)
    picture = noise(32, 32)

    def draw() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [train(picture) for _ in range(20)]

    one, two = draw(), draw()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(not torch.equal(a, one[0]) for a in one[1:])
    assert all(bool((a != 0).all()) for a in one)


@pytest.mark.parametrize(
    ("kind", "keys", "line"),
    [
        (EVAL, {"image_size": 384}, "vis_processor.image_size: unknown key"),
        (EVAL, {"augment": "flip"}, "vis_processor.augment: unknown key"),
        (EVAL, {"multiple": 0}, "vis_processor: multiple: 0 is not positive"),
        (EVAL, {"shorter": 16}, "vis_processor: shorter: 16 is less than multiple 32"),
        (EVAL, {"longer": 4097}, "vis_processor: the longer side may have 4097 pixels, which is more than 4096"),
        (EVAL, {"shorter": 3000}, "vis_processor: the longer side may have 4998 pixels, which is more than 4096"),
        (EVAL, {"longer": 300}, "vis_processor: longer: 300 is less than shorter 384"),
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

    assert registry.get_processor_class(EVAL) is vilt_images.ViltImageEvalProcessor
    assert registry.get_processor_class(TRAIN) is vilt_images.ViltImageTrainProcessor
