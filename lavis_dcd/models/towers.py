"""Uni-modal towers: pictures and texts to tokens, through timm and ``transformers``."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import AutoConfig, CLIPVisionConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.models.clip.modeling_clip import CLIPVisionTransformer

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import update_with_tensors
from lavis_dcd.common.tensor_files import load_tensors, tensor_faults, tensors_of
from lavis_dcd.models.hub import encoder_with_weights, load_tokenizer, sizes_in

_CLASSIFIERS = ("classifier.", "fc.", "head.")  # of timm's backbones
_SPECIAL_TOKENS = 2  # around every caption: [CLS] and [SEP], or their like


@dataclass
class VisionConfig:
    """The vision tower.

    ``backbone: clip_vit`` is METER's CLIP-ViT, built from the sizes below; ``timm:<name>`` is any timm backbone's
    ``forward_features`` (its map becomes tokens).
    """

    backbone: str = "clip_vit"  # clip_vit, or timm:<name>
    image_size: int = 384  # side of the pictures in pixels; the processors' image_size must be the same
    patch_size: int = 16  # clip_vit only: side of a patch in pixels
    width: int = 768  # clip_vit only: channels of a token
    layers: int = 11  # blocks that run: METER drops CLIP's last one, so 11 of ViT-B's 12
    heads: int | None = None  # None: one per 64 channels, as in CLIP
    # the tower's own weights, when no checkpoint of the whole model has them: a file in timm's names, for clip_vit one
    # of a CLIP in transformers' names
    weights: str | None = None
    grid: int | None = None  # timm maps only: average-pool the map to grid x grid tokens
    freeze: bool = False  # the tower does not learn

    def __post_init__(self) -> None:
        least = {"image_size": 1, "grid": 1} | ({"width": 1, "layers": 0, "heads": 1} if self._is_clip() else {})
        faults = [
            f"{name}: {getattr(self, name)}, at least {minimum} is needed"
            for name, minimum in least.items()
            if getattr(self, name) is not None and getattr(self, name) < minimum
        ]
        if self._is_clip() and not faults:
            if self.patch_size < 1 or self.image_size % self.patch_size:
                faults.append(f"image_size: {self.image_size} is no multiple of patch_size {self.patch_size}")
            if self.width % self.attention_heads():
                faults.append(f"width: {self.width} is no multiple of heads {self.attention_heads()}")
        if faults:
            raise ValueError("; ".join(faults))

    def _is_clip(self) -> bool:
        return self.backbone == "clip_vit"

    def attention_heads(self) -> int:
        """Return the heads of a block of clip_vit."""
        return self.heads or max(1, self.width // 64)


@dataclass
class TextConfig:
    """The text tower: an encoder of ``transformers``."""

    # bert, roberta or another model type of transformers (distilbert, mpnet, ...); auto: as ``name``, or as
    # ``config.model_type``, says
    family: str = "roberta"
    name: str = "roberta-base"  # hub name or local folder: the tokenizer, and the weights when load_weights is set
    load_weights: bool = False  # start from the weights in ``name`` (a checkpoint of the whole model brings its own)
    max_length: int = 40  # tokens, the two specials included; longer captions are cut
    config: dict[str, Any] = field(default_factory=dict)  # sizes in transformers' names; empty: read from ``name``
    freeze: bool = False  # the tower does not learn


class ClipVisionTower(nn.Module):
    """METER's CLIP-ViT: every token of the last block that runs, after CLIP's final norm.

    METER (official ``clip_model.py``) leaves out CLIP's last block and normalises all tokens, where CLIP itself
    normalises the class token alone.
    """

    adds_class_token = False

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.vit = CLIPVisionTransformer(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.attention_heads(),
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        self.width = config.width
        self.num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.image_size = config.image_size
        if config.weights:
            self._load(Path(config.weights))

    def _load(self, path: Path) -> None:
        tensors = {k.rpartition("vision_model.")[2]: v for k, v in tensors_of(load_tensors(path)).items()}
        needed = {k: v for k, v in self.vit.state_dict().items() if not k.endswith("position_ids")}
        wrong = [k for k, v in needed.items() if k not in tensors or tensors[k].shape != v.shape]
        if wrong:
            raise UserError(
                f"model.vision.weights: {path} lacks {len(wrong)} of the tower's {len(needed)} weights or has them in "
                f"another size, first {wrong[0]}; give a CLIP of model.vision's sizes in transformers' names"
            )
        _refuse_faults(tensors, needed, path)
        self.vit.load_state_dict({k: tensors[k] for k in needed}, strict=False)

    def settings(self) -> dict[str, Any]:
        """Return what shapes the tokens beside the weights."""
        config = self.vit.config
        names = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")
        return {name: getattr(config, name) for name in names}

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
        import timm  # noqa: PLC0415  seconds of import, for this backbone only

        name = config.backbone.removeprefix("timm:")
        if name not in timm.list_models():
            raise UserError(f"model.vision.backbone: timm has no {name!r}; timm.list_models() lists what it has")
        self.backbone = timm.create_model(name, pretrained=False)
        self.name, self.grid, self.image_size = name, config.grid, config.image_size
        if config.weights:
            self._load(Path(config.weights))
        if hasattr(self.backbone, "classifier") or hasattr(self.backbone, "fc") or hasattr(self.backbone, "head"):
            self.backbone.reset_classifier(0)
        self.num_tokens, self.width = self._probe()

    def _probe(self) -> tuple[int, int]:
        """Tokens of a picture, and their channels."""
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad():
                tokens = self(torch.zeros(1, 3, self.image_size, self.image_size))
        except (AssertionError, RuntimeError) as error:
            raise UserError(
                f"model.vision.image_size: timm's {self.name} does not take pictures of {self.image_size} pixels "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from error
        self.backbone.train(was_training)
        return tokens.shape[1], tokens.shape[2]

    def _load(self, path: Path) -> None:
        tensors = tensors_of(load_tensors(path))
        # another number of classes is no matter: the classifier is not run
        tensors = {k: v for k, v in tensors.items() if not k.startswith(_CLASSIFIERS)}
        _refuse_faults(tensors, self.backbone.state_dict(), path)
        missing, unexpected = self.backbone.load_state_dict(tensors, strict=False)
        # a classifier is not run, so a file may come without one
        missing = [k for k in missing if not k.startswith(_CLASSIFIERS)]
        if missing:
            raise UserError(
                f"model.vision.weights: {path} lacks {len(missing)} weights of the backbone, first {missing[0]}; give "
                "weights in timm's names"
            )
        if unexpected:
            logging.warning("%s: ignored %d tensors, first %s", path, len(unexpected), unexpected[0])

    def settings(self) -> dict[str, Any]:
        """Return what shapes the tokens beside the weights."""
        return {"backbone": self.name, "grid": self.grid, "image_size": self.image_size}

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, S, S]`` -> ``[B, N, C]``."""
        features = self.backbone.forward_features(images)
        if isinstance(features, tuple):  # distilled transformers: the class and the distillation token
            return torch.stack(features, dim=1)
        if features.ndim == 4:
            if self.grid:
                features = nnf.adaptive_avg_pool2d(features, self.grid)
            return features.flatten(2).transpose(1, 2)
        return features if features.ndim == 3 else features.unsqueeze(1)


VisionTower = ClipVisionTower | TimmVisionTower


def _refuse_faults(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    if faults := tensor_faults(tensors, expected, path):
        raise UserError([f"model.vision.weights: {line}" for line in faults[:10]])


class TextTower(nn.Module):
    """Tokens of a text encoder of ``transformers``, and its tokenizer, which is read at the first text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.max_length <= _SPECIAL_TOKENS:
            raise UserError(
                f"model.text.max_length: {config.max_length} cuts every caption to nothing but its {_SPECIAL_TOKENS} "
                f"special tokens; give at least {_SPECIAL_TOKENS + 1}"
            )
        self.model = _text_encoder(config)
        self.width = self.model.config.hidden_size
        self.name, self.max_length, self.family = config.name, config.max_length, config.family
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The ``transformers`` tokenizer of ``name`` (hub name, local folder, or a BERT ``vocab.txt``).

        Raises:
            UserError: when it is neither on disk nor can be fetched, or has more ids than the tower has embeddings.
        """
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.name)
            if len(self._tokenizer) > self.model.config.vocab_size:
                raise UserError(
                    f"model.text.name: the tokenizer {self.name} has {len(self._tokenizer)} entries, the text tower "
                    f"only {self.model.config.vocab_size}: name the tokenizer that the weights were trained with"
                )
            if self._tokenizer.pad_token is None:
                raise UserError(
                    f"model.text.name: the tokenizer {self.name} has no padding token; name an encoder's, as BERT's"
                )
        return self._tokenizer

    def settings(self) -> dict[str, Any]:
        """Return what shapes the tokens beside the weights and the tokenizer."""
        config = encoder_arithmetic(self.model.config)
        return {"model": type(self.model).__name__, "config": config, "max_length": self.max_length}

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """int64 ids ``[B, L]`` and bool mask ``[B, L]``, L the longest of the batch and at most ``max_length``."""
        batch = self.tokenizer(
            texts, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        device = next(self.model.parameters()).device
        return batch["input_ids"].to(device), batch["attention_mask"].bool().to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """int64 ids ``[B, L]``, bool mask ``[B, L]`` -> ``[B, L, width]``."""
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state


def build_vision_tower(config: VisionConfig) -> VisionTower:
    """Build the tower that ``config.backbone`` names.

    Raises:
        UserError: for a name that is neither ``clip_vit`` nor ``timm:<a timm model>``.
    """
    if config.backbone == "clip_vit":
        return ClipVisionTower(config)
    if config.backbone.startswith("timm:"):
        return TimmVisionTower(config)
    raise UserError(f"model.vision.backbone: {config.backbone!r}; say clip_vit or timm:<name of a timm model>")


def _text_encoder(config: TextConfig) -> PreTrainedModel:
    """The encoder that ``config`` describes, without a pooler: nothing here runs it."""
    sizes = _text_sizes(config)
    if sizes.is_encoder_decoder or not hasattr(sizes, "hidden_size") or type(sizes) not in MODEL_MAPPING:
        raise UserError(f"model.text: a {sizes.model_type} is no plain text encoder; choose one such as bert or mpnet")
    model_class = MODEL_MAPPING[type(sizes)]
    poolable = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    options = {"add_pooling_layer": False} if poolable else {}
    if config.load_weights:
        return encoder_with_weights(model_class, config.name, **options).float()
    try:
        return model_class(sizes, **options)
    except (ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.text.config: no {sizes.model_type} has such sizes ({reason}); correct them") from error


def encoder_arithmetic(config: PretrainedConfig) -> dict[str, Any]:
    """The entries of a ``transformers`` configuration that can shape an encoder's tokens."""
    general = set(PretrainedConfig().to_dict()) - {"pad_token_id", "model_type"}
    inert = ("gradient_checkpointing", "use_cache", "initializer_range", "vocab_size")
    return {
        name: value
        for name, value in config.to_dict().items()
        if name not in general and name not in inert and "dropout" not in name
    }


def _text_sizes(config: TextConfig) -> PretrainedConfig:
    family = config.family
    if family != "auto" and family not in CONFIG_MAPPING:
        raise UserError(
            f"model.text.family: {family!r} is neither auto nor a model type of transformers "
            "(bert, roberta, distilbert, mpnet, ...)"
        )
    if config.load_weights or not config.config:
        sizes = sizes_in(config.name)
        if family not in ("auto", sizes.model_type):
            raise UserError(f"model.text.family: {family}, but {config.name} holds a {sizes.model_type}; say auto")
        return sizes
    options = dict(config.config)
    named = options.pop("model_type", None)
    kind = named if family == "auto" else family
    if named not in (None, kind):
        raise UserError(f"model.text.config.model_type: {named!r}, but model.text.family says {family}; say auto")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"model.text.config.model_type: {kind!r}; with family: auto the sizes must name a model type of "
            "transformers (bert, distilbert, mpnet, ...)"
        )
    try:
        return AutoConfig.for_model(kind, **options)
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(f"model.text.config: {kind} takes no such sizes ({error}); correct them") from error


# buffers that no frozen tower's output depends on
_INERT = ("position_ids", "num_batches_tracked")


def towers_signature(vision_tower: VisionTower, text_tower: TextTower) -> str | None:
    """Return a hash over both towers' classes, settings and weights, and the tokenizer.

    Equal hashes mean equal features. Weights and tokenizer are read once; the weights again after a change.

    Returns:
        64 hexadecimal digits; ``None`` where the tokenizer cannot be read.
    """
    tokenizer = _tokenizer_digest(text_tower)
    if tokenizer is None:
        return None
    towers = [[type(tower).__name__, tower.settings(), _weights_digest(tower)] for tower in (vision_tower, text_tower)]
    return _hash_of([towers, tokenizer])


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _weights_digest(tower: nn.Module) -> str:
    tensors = {k: t for k, t in tower.state_dict(keep_vars=True).items() if not k.endswith(_INERT)}
    # the version counts a tensor's changes in place; the rest tells another tensor, or other storage, of the name
    state = [(id(t), t.data_ptr(), t._version) for t in tensors.values()]
    known = tower.__dict__.get("_known_weights")
    if known is not None and known[0] == state:
        return known[1]
    digest = hashlib.sha256()
    update_with_tensors(digest, tensors.items())
    tower.__dict__["_known_weights"] = (state, digest.hexdigest())
    return digest.hexdigest()


def _tokenizer_digest(text_tower: nn.Module) -> str | None:
    """A hash of the vocabulary and the rules; a tokenizer that cannot be read is not asked for again."""
    if "_known_tokenizer" not in text_tower.__dict__:
        try:
            text_tower.__dict__["_known_tokenizer"] = _hash_of(_tokenizer_content(text_tower.tokenizer))
        except UserError:
            text_tower.__dict__["_known_tokenizer"] = None
    return text_tower.__dict__["_known_tokenizer"]


def _tokenizer_content(tokenizer: Any) -> dict[str, Any]:
    content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # truncation and padding are the latest call's
        content["rules"] = {k: v for k, v in rules.items() if k not in ("truncation", "padding")}
    return content
