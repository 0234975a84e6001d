"""What METER, ViLT and the dual encoder have in common as LAVIS models: sections, files, and frozen towers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from typing_extensions import Self, override

from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.evaluation.shortlist import score_dataset
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.learner import Learner
from lavis_dcd.matching.recompute import repeated_layers
from lavis_dcd.models import weights
from lavis_dcd.models.towers import towers_signature

# ----------------------------------------------------------------------------------------------------
# LAVIS's evaluation hooks for any matcher that is a LAVIS model.


class LavisEvaluation:
    """A mix-in: what LAVIS's own ``RetrievalTask`` and runners call on a model."""

    def before_evaluation(self, **kwargs: Any) -> None:
        """LAVIS's hook; nothing to prepare."""

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Image-to-text scores ``[I, T]`` and text-to-image scores ``[T, I]``, float32.

        Args:
            data_loader: over an evaluation data set (``.text``; samples with ``image``).
            task_cfg: LAVIS's ``run:`` section; ``k_test`` reranks that many of the joint space's best, without it
                every pair is matched.

        Raises:
            UserError: ``k_test`` for a model without a joint space.
        """
        k_test = task_cfg.get("k_test") if task_cfg is not None else None
        scores = score_dataset(self, data_loader.dataset, k_test=k_test, device=self.device)
        return scores[0].numpy(), scores[1].numpy()


log = logging.getLogger(__name__)


class CheckpointFiles(Protocol):
    """How an arch's files are read: a module with these four functions."""

    @staticmethod
    def read(path: Path) -> weights.SavedWeights: ...

    @staticmethod
    def built_from(saved: weights.SavedWeights, own: Any) -> Any: ...

    @staticmethod
    def load_into(model: nn.Module, saved: weights.SavedWeights, path: Path) -> weights.LoadReport: ...

    @staticmethod
    def portable(config: Any) -> dict[str, Any]: ...


class Retriever(LavisEvaluation, Learner, BaseModel, Matcher):
    """A LAVIS retrieval model that is a matcher, built from a dataclass.

    Sub-classes build their modules in ``_build(config)``, which is run anew when a file holds other modules.

    Args:
        config: a ``config_class``.
    """

    config_class: ClassVar[type]
    files: ClassVar[CheckpointFiles]

    def __init__(self, config: Any):
        super().__init__()
        self._build(config)

    def _build(self, config: Any) -> None:
        raise NotImplementedError

    @classmethod
    def arch(cls) -> str:
        """The LAVIS name."""
        return cls.config_class.__dataclass_fields__["arch"].default

    @classmethod
    def config_schema(cls) -> type:
        """The dataclass that a ``model:`` section of this arch must fit."""
        return cls.config_class

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Built from a ``model:`` section, weights loaded when it names some.

        Raises:
            UserError: unknown keys, wrong types, sizes that cannot work, weights that do not fit.
        """
        config = parse(cls.config_class, cfg or {}, "model")
        source = config.finetuned if config.load_finetuned and config.finetuned else config.pretrained
        if not source:
            log.info("%s: no checkpoint named; at random until one is loaded: %s", cls.arch(), cls.random_parts(config))
            return cls(config)
        path = weights.locate(source, config.checkpoint_sha256)
        saved = cls.files.read(path)
        model = cls(cls.files.built_from(saved, config))
        cls.files.load_into(model, saved, path).log(path)
        return model

    @classmethod
    def random_parts(cls, config: Any) -> str:
        """In words, what has no weights of its own."""
        return "all of it"

    def load_checkpoint(self, url_or_filename: str) -> weights.LoadReport:
        """Weights of a file in any of the layouts that this arch reads.

        One of ours says what it is built from; when that differs from this model (a thinned student loaded over
        its teacher's type, say), the model is rebuilt to it first.

        Raises:
            UserError: a file that is missing, cannot be fetched, holds more than tensors, is another arch's, or leaves
                an inference weight at random.
        """
        path = weights.locate(url_or_filename, self.config.checkpoint_sha256)
        saved = self.files.read(path)
        rebuilt = self.files.built_from(saved, self.config)
        if rebuilt is not self.config:
            log.info("%s: rebuilding %s to the file's own configuration", path, self.arch())
            device, training = self.device, self.training
            self._modules.clear()
            self._parameters.clear()
            self._build(rebuilt)
            self.to(device).train(training)
        report = self.files.load_into(self, saved, path)
        report.log(path)
        return report

    @override
    def checkpoint(self) -> dict[str, Any]:
        # frozen parts included
        return {"model": self.state_dict(), "arch": self.arch(), "config": self.files.portable(self.config)}

    @override
    def head_parameter_names(self) -> set[str]:
        prefixes = tuple(self.config.fast_parameters)
        return {name for name, _ in self.named_parameters() if prefixes and name.startswith(prefixes)}

    def train(self, mode: bool = True) -> Self:
        """Train mode, frozen encoders excepted: dropout in what does not learn is noise."""
        super().train(mode)
        for module in self.encoder_modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


class TwoTowers(Retriever):
    """A retriever whose features are the tokens of ``vision_tower`` and ``text_tower``."""

    @classmethod
    def random_parts(cls, config: Any) -> str:
        named = {"the vision tower": config.vision.weights, "the text tower": config.text.load_weights}
        return ", ".join([*(name for name, found in named.items() if not found), "what works on top of the towers"])

    def encoder_modules(self) -> list[nn.Module]:
        return [self.vision_tower, self.text_tower]

    def sharding_units(self) -> list[nn.Module]:
        return [layer for tower in self.encoder_modules() for layer in repeated_layers(tower)]

    def encoder_signature(self) -> str | None:
        return towers_signature(self.vision_tower, self.text_tower)

    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(self.vision_tower(images))

    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return self.encode_token_ids(*self.text_tower.tokenize(texts))

    def encode_token_ids(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Features of tokenised texts: int64 ids ``[B, L]``, bool mask ``[B, L]``."""
        return TextFeatures(self.text_tower(ids, mask), mask.bool())


def model_types(arch: str, *names: str) -> dict[str, str]:
    """``PRETRAINED_MODEL_CONFIG_DICT`` of an arch: each type's YAML among the packaged ``configs/models``."""
    return {name: str(packaged_folder("configs") / "models" / f"{arch}_{name}.yaml") for name in names}
