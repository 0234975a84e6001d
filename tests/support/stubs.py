"""Stub matchers and data sets that several test files share; nothing here needs LAVIS or a file.

``from stubs import ...``: pyproject.toml puts this folder on the path of every test run, whole or of one file.
A test that needs another behaviour subclasses the nearest stub and overrides just that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures


class StubMatcher(nn.Module, Matcher):
    """The contract in its simplest form: pixels as tokens, blank texts, scores of 0, one tower that may be shared."""

    def __init__(self, tower: nn.Module | None = None) -> None:
        super().__init__()
        self.tower = nn.Linear(1, 1) if tower is None else tower

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(images.flatten(2))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(torch.zeros(len(texts), 1, 1))

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        return torch.zeros(len(pairs))

    def encoder_modules(self) -> list[nn.Module]:
        return [self.tower]


class ColourMatcher(StubMatcher):
    """Pictures by their mean colour, texts by three numbers of their letters, a bilinear form of the two.

    Keeps what it worked on: ``images_seen``, ``sizes_seen`` (a picture's width, per call), ``texts_seen``,
    ``matched`` (the pairs of each call) and ``types`` (of features, and whether autocast was on).
    """

    def __init__(self, seed: int = 0, dropout: float = 0.0, joint: bool = False) -> None:
        super().__init__(nn.Linear(3, 4))
        self.fusion = nn.Bilinear(4, 4, 1)
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.dropout, self.has_joint_space = nn.Dropout(dropout), joint
        self.images_seen = 0
        self.sizes_seen: list[int] = []
        self.texts_seen: list[str] = []
        self.matched: list[set[tuple[int, int]]] = []
        self.types: set[tuple[torch.dtype, bool]] = set()
        self.pairs_seen = 0

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.images_seen += len(images)
        self.sizes_seen.append(images.shape[-1])
        return ImageFeatures(self.tower(images.mean(dim=(2, 3)))[:, None])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.texts_seen += texts
        codes = torch.tensor([[len(t) / 10, sum(map(ord, t)) % 7 / 7, sum(map(ord, t)) % 11 / 11] for t in texts])
        return TextFeatures(self.tower(codes)[:, None])

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.pairs_seen += len(pairs)
        self.matched.append({(image, text) for image, text in pairs.tolist()})
        self.types.add((images.tokens.dtype, torch.is_autocast_enabled("cpu")))
        image, text = self.dropout(images.tokens[pairs[:, 0], 0]), texts.tokens[pairs[:, 1], 0]
        # by hand: under autocast nn.Bilinear refuses what the towers give
        return (image @ self.fusion.weight[0] * text).sum(dim=-1) + self.fusion.bias

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return nn.functional.normalize(images.tokens[:, 0], dim=-1)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return nn.functional.normalize(texts.tokens[:, 0], dim=-1)


class DualColourMatcher(ColourMatcher):
    """The same features, scored by one product."""

    family = "dual"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed, joint=True)

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.pairs_seen += len(pairs)
        return self.match_all(images, texts)[pairs[:, 0], pairs[:, 1]]

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        return 5 * images.tokens[:, 0] @ texts.tokens[:, 0].T


class NumberMatcher(StubMatcher):
    """Reads the number that a picture shows and a caption begins with; right but for the pictures in ``blind``.

    It takes those for the next one. ``matched`` counts the pairs scored.
    """

    def __init__(self, blind: tuple[int, ...] = (), joint: bool = True, tower: nn.Module | None = None) -> None:
        super().__init__(tower or nn.Identity())
        self.weight = nn.Parameter(torch.ones(1))
        self.blind, self.has_joint_space, self.matched = blind, joint, 0

    def encode_images(self, images: Tensor) -> ImageFeatures:
        seen = [n + 1 if n in self.blind else n for n in images[:, 0, 0, 0].tolist()]
        return ImageFeatures(torch.tensor(seen)[:, None, None])

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return TextFeatures(torch.tensor([float(t.split()[0]) for t in texts])[:, None, None])

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        self.matched += len(pairs)
        return -(images.tokens[pairs[:, 0], 0, 0] - texts.tokens[pairs[:, 1], 0, 0]).abs() * self.weight

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return _on_a_circle(images.tokens[:, 0, 0])

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return _on_a_circle(texts.tokens[:, 0, 0])


class LetterMatcher(StubMatcher):
    """A frozen linear layer over pixels and a frozen embedding of letters, with masks and embeds; of either family.

    ``towers``: another one's, to share its encoders. Keeps ``pictures``, how many it encoded, and ``encoded``, the
    texts.
    """

    has_joint_space = True

    def __init__(
        self, seed: int | None = None, family: str = "fusion", towers: nn.Module | None = None, width: int = 6
    ) -> None:
        if seed is not None:
            torch.manual_seed(seed)
        super().__init__(towers or nn.ModuleDict({"vision": nn.Linear(3, width), "words": nn.Embedding(128, width)}))
        self.tower.requires_grad_(False)
        self.mix = nn.Linear(width, width)
        self.family = family
        self.pictures = 0
        self.encoded: list[str] = []

    @property
    def vision(self) -> nn.Module:
        return self.tower["vision"]

    def encode_images(self, images: Tensor) -> ImageFeatures:
        self.pictures += len(images)
        tokens = self.vision(images.flatten(2).transpose(1, 2))
        return ImageFeatures(tokens, embeds=tokens.mean(1))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        self.encoded += texts
        length = max(map(len, texts))
        ids = torch.tensor([[ord(c) for c in t.ljust(length)] for t in texts])
        mask = torch.tensor([[i < len(t) for i in range(length)] for t in texts])
        return TextFeatures(self.tower["words"](ids), mask)

    def embed_images(self, images: ImageFeatures) -> Tensor:
        return nn.functional.normalize(images.embeds, dim=1)

    def embed_texts(self, texts: TextFeatures) -> Tensor:
        return nn.functional.normalize((texts.tokens * texts.full_mask()[..., None]).sum(1), dim=1)

    def match(self, images: ImageFeatures, texts: TextFeatures, pairs: Tensor) -> Tensor:
        one, other = self.mix(images.tokens).tanh().mean(1), self.embed_texts(texts)
        return (one[pairs[:, 0]] * other[pairs[:, 1]]).sum(1)

    def match_all(self, images: ImageFeatures, texts: TextFeatures) -> Tensor:
        if self.family == "fusion":
            return super().match_all(images, texts)
        return self.mix(self.embed_images(images)) @ self.embed_texts(texts).T


class EvaluationSet(torch.utils.data.Dataset):
    """LAVIS's evaluation shape over pictures in memory: ``pictures [N, 3, H, W]`` and each one's captions.

    ``read`` lists the pictures taken.
    """

    vis_root = None

    def __init__(self, pictures: Tensor, captions: Sequence[Sequence[str]]) -> None:
        assert len(pictures) == len(captions)
        self.pictures = pictures
        self.image = [f"{i}.png" for i in range(len(pictures))]
        self.annotation = [{"image": n, "caption": list(c)} for n, c in zip(self.image, captions, strict=True)]
        self.text: list[str] = []
        self.img2txt: dict[int, list[int]] = {}
        for row, texts in enumerate(captions):
            self.img2txt[row] = list(range(len(self.text), len(self.text) + len(texts)))
            self.text += texts
        self.txt2img = {text: row for row, texts in self.img2txt.items() for text in texts}
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        return {"image": self.pictures[index], "index": index}


class NumberSet(EvaluationSet):
    """Pictures that show a number, two captions each that name it."""

    def __init__(self, count: int = 8) -> None:
        pictures = torch.arange(float(count))[:, None, None, None].expand(count, 3, 2, 2)
        super().__init__(pictures, [[f"{i} shown", f"{i} here"] for i in range(count)])


class NoiseSet(EvaluationSet):
    """Pictures of noise, each by its number alone, with these captions."""

    def __init__(self, size: int, captions: Sequence[Sequence[str]]) -> None:
        pictures = [
            torch.randn(3, size, size, generator=torch.Generator().manual_seed(i)) for i in range(len(captions))
        ]
        super().__init__(torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size), captions)


def colour_samples(size: int = 6, seed: int = 0) -> dict[str, Any]:
    """A training batch for ``ColourMatcher``; its last sample is another caption of the first one's picture."""
    images = torch.randn(size, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    images[-1] = images[0]
    return {
        "image": images,
        "text_input": [f"caption {'x' * i} {i}" for i in range(size)],
        "image_id": torch.tensor([*range(size - 1), 0]),
    }


def _on_a_circle(numbers: Tensor) -> Tensor:
    return torch.stack([(numbers / 10).cos(), (numbers / 10).sin()], dim=1)
