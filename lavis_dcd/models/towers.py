"""Uni-modal towers: pictures and texts to tokens, through timm and ``transformers``."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import BertConfig, BertModel, CLIPVisionConfig, RobertaConfig, RobertaModel
from transformers.models.clip.modeling_clip import CLIPVisionTransformer

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import load_tensors
from lavis_dcd.models.meter_config import TextConfig, VisionConfig

_TEXT_FAMILIES = {"roberta": (RobertaConfig, RobertaModel), "bert": (BertConfig, BertModel)}


class ClipVisionTower(nn.Module):
    """METER's CLIP-ViT: every token of the last block that runs, after CLIP's final norm.

    METER (official ``clip_model.py``) leaves out CLIP's last block and normalises all tokens, where CLIP itself
    normalises the class token alone.
    """

    adds_class_token = False

    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.image_size % config.patch_size:
            raise UserError(
                f"model.vision.image_size: {config.image_size} is not a multiple of patch_size {config.patch_size}"
            )
        self.vit = CLIPVisionTransformer(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads or max(1, config.width // 64),
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        self.width = config.width
        self.num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.image_size = config.image_size

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, S, S]`` -> ``[B, 1 + (S / patch)^2, width]``."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise UserError(
                f"pictures of {tuple(images.shape[-2:])} pixels, but model.vision.image_size is {self.image_size}: "
                "set the processor's image_size to the model's"
            )
        hidden = self.vit.pre_layrnorm(self.vit.embeddings(images))
        return self.vit.post_layernorm(self.vit.encoder(inputs_embeds=hidden).last_hidden_state)


class TimmVisionTower(nn.Module):
    """Any timm backbone's ``forward_features``: a map ``[B, C, H, W]`` becomes H*W tokens, a vector one token."""

    adds_class_token = True

    def __init__(self, config: VisionConfig):
        super().__init__()
        import timm

        name = config.backbone.removeprefix("timm:")
        if name not in timm.list_models():
            raise UserError(f"model.vision.backbone: timm has no {name!r}; timm.list_models() lists what it has")
        self.backbone = timm.create_model(name, pretrained=False)
        self.grid = config.grid
        if config.weights:
            self._load(Path(config.weights))
        else:
            logging.warning("vision backbone %s starts from random weights (model.vision.weights is not set)", name)
        if hasattr(self.backbone, "classifier") or hasattr(self.backbone, "fc") or hasattr(self.backbone, "head"):
            self.backbone.reset_classifier(0)
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.no_grad():
            probe = self(torch.zeros(1, 3, config.image_size, config.image_size))
        self.backbone.train(was_training)
        self.num_tokens, self.width = probe.shape[1:]

    def _load(self, path: Path) -> None:
        missing, unexpected = self.backbone.load_state_dict(load_tensors(path), strict=False)
        # a classifier is not run, so a file may come without one
        missing = [k for k in missing if not k.startswith(("classifier.", "fc.", "head."))]
        if missing:
            raise UserError(f"{path}: lacks {len(missing)} weights of the backbone, first {missing[0]}")
        if unexpected:
            logging.warning("%s: ignored %d tensors, first %s", path, len(unexpected), unexpected[0])

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, S, S]`` -> ``[B, N, C]``."""
        features = self.backbone.forward_features(images)
        if features.ndim == 4:
            if self.grid:
                features = nnf.adaptive_avg_pool2d(features, self.grid)
            return features.flatten(2).transpose(1, 2)
        return features if features.ndim == 3 else features.unsqueeze(1)


class TextTower(nn.Module):
    """Tokens of a BERT or RoBERTa, and its tokenizer, which is read at the first text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.family not in _TEXT_FAMILIES:
            raise UserError(f"model.text.family: {config.family!r} is none of {sorted(_TEXT_FAMILIES)}")
        config_class, model_class = _TEXT_FAMILIES[config.family]
        if config.load_weights:
            self.model = _hub(model_class, config.name, add_pooling_layer=False).float()
        else:
            sizes = config_class(**config.config) if config.config else _hub(config_class, config.name)
            self.model = model_class(sizes, add_pooling_layer=False)
        self.width = self.model.config.hidden_size
        self.name, self.max_length, self.family = config.name, config.max_length, config.family
        self._tokenizer = None

    @property
    def tokenizer(self):
        """The ``transformers`` tokenizer of ``name`` (hub name, local folder, or a BERT ``vocab.txt``).

        Raises:
            UserError: when it is neither on disk nor can be fetched, or has more ids than the tower has embeddings.
        """
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.name)
            if len(self._tokenizer) > self.model.config.vocab_size:
                raise UserError(
                    f"model.text.name: the tokenizer {self.name} has {len(self._tokenizer)} entries, the text tower "
                    f"only {self.model.config.vocab_size}: name the tokenizer that the weights were trained with"
                )
        return self._tokenizer

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """int64 ids ``[B, L]`` and bool mask ``[B, L]``, L the longest of the batch and at most ``max_length``."""
        batch = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        return batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 ids ``[B, L]``, bool mask ``[B, L]`` -> ``[B, L, width]``."""
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state


def build_vision_tower(config: VisionConfig) -> nn.Module:
    """The tower that ``config.backbone`` names.

    Raises:
        UserError: for a name that is neither ``clip_vit`` nor ``timm:<a timm model>``.
    """
    if config.backbone == "clip_vit":
        return ClipVisionTower(config)
    if config.backbone.startswith("timm:"):
        return TimmVisionTower(config)
    raise UserError(f"model.vision.backbone: {config.backbone!r}; say clip_vit or timm:<name of a timm model>")


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer, BertTokenizerFast

    if name.endswith(".txt"):
        if not Path(name).is_file():
            raise UserError(f"model.text.name: no vocabulary file {name}")
        return BertTokenizerFast(vocab_file=name, do_lower_case=True)
    return _hub(AutoTokenizer, name)


def _hub(loader: type, name: str, **options):
    """``loader.from_pretrained(name)``, a missing file or network told in one line."""
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(name).is_absolute() or Path(name).exists() else "hub name"
        raise UserError(
            f"model.text.name: {loader.__name__} cannot be read from {kind} {name!r} "
            f"({str(error).splitlines()[0]}); give a local folder with its files, or run once with a network"
        ) from error
