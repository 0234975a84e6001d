"""The base classes of METER, ViLT and the dual encoder as LAVIS models: sections, files, and frozen towers."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import numpy as np
import torch
from lavis.models.base_model import BaseModel
from torch import Tensor, nn
from typing_extensions import Self, override

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import packaged_folder
from lavis_dcd.common.schema import parse
from lavis_dcd.config.run_section import EvaluationProtocol
from lavis_dcd.evaluation.evaluator import Evaluator
from lavis_dcd.evaluation.shortlist import ShortlistError
from lavis_dcd.matching.contract import Matcher
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.learner import Learner
from lavis_dcd.matching.recompute import repeated_layers
from lavis_dcd.models import weights
from lavis_dcd.models.sizes import no_larger_than
from lavis_dcd.models.towers import TextTower, VisionTower, towers_signature
from lavis_dcd.models.weights import CheckpointFormat

log = logging.getLogger(__name__)


class LavisEvaluation:
    """A mix-in for matchers that are LAVIS models: what LAVIS's own ``RetrievalTask`` and runners call on them."""

    device: torch.device

    def before_evaluation(self, **kwargs: Any) -> None:
        """LAVIS's hook; nothing to prepare."""

    def compute_sim_matrix(self, data_loader: Any, task_cfg: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Return image-to-text scores ``[I, T]`` and text-to-image scores ``[T, I]``, float32.

        Args:
            data_loader: over an evaluation data set (``.text``; samples with ``image``).
            task_cfg: LAVIS's ``run:`` section; ``k_test`` reranks that many of the joint space's best, without it
                every pair is matched.

        Raises:
            UserError: ``k_test`` for a model without a joint space.
        """
        k_test = task_cfg.get("k_test") if task_cfg is not None else None
        protocol = EvaluationProtocol(k_test=k_test, memory_mb=512)
        try:
            scores_i2t, scores_t2i = Evaluator(protocol, self.device).scores(cast(Matcher, self), data_loader.dataset)
        except ShortlistError as error:
            raise UserError(f"run.k_test: {error}; leave it empty to score every pair") from error
        return scores_i2t.numpy(), scores_t2i.numpy()


@runtime_checkable
class ThinsFromTeacher(Protocol):
    """A model that can start from layers of a teacher of its kind, and be such a teacher."""

    def init_from_teacher(self, teacher: nn.Module, layers: list[int], share_encoders: bool = False) -> None:
        """Copy the teacher's fusion ``layers`` and all else; with ``share_encoders`` use its encoder modules."""


@runtime_checkable
class AdoptsTowers(Protocol):
    """A model that can take over a teacher's uni-modal towers."""

    def adopt_towers(self, teacher: nn.Module, share: bool = True) -> None:
        """Use the teacher's towers, frozen; without ``share`` copies of them."""


@dataclass(frozen=True)
class Succession:
    """The tensors of a teacher that a student of the same arch starts from.

    Args:
        stacks: regular expression of the layer stacks' names, before the layer's number; without groups.
        sizes: what both must have in common, for messages.
        optional: modules that the student may have anew where the teacher has none.
    """

    stacks: str
    sizes: str
    optional: tuple[str, ...] = ()


class Retriever(LavisEvaluation, Learner, BaseModel, Matcher):
    """A LAVIS retrieval model that is a matcher, built from a dataclass.

    Sub-classes build their modules in ``_build(config)``, which is run anew when a file holds other modules.

    Args:
        config: a ``config_class``.
    """

    config_class: ClassVar[type]
    files: ClassVar[CheckpointFormat[Any]]
    config: Any

    def __init__(self, config: Any):
        super().__init__()
        self._build(config)

    def _build(self, config: Any) -> None:
        raise NotImplementedError

    @classmethod
    def arch(cls) -> str:
        """Return the LAVIS name."""
        return str(next(field.default for field in fields(cls.config_class) if field.name == "arch"))

    @classmethod
    def config_schema(cls) -> type:
        """Return the dataclass that a ``model:`` section of this arch must fit."""
        return cls.config_class

    @classmethod
    def negatives_in_batch_only(cls, section: Mapping[str, Any]) -> bool:
        """Return True: the losses compare the pairs of a batch."""
        return True

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> Self:
        """Build the model from a ``model:`` section, weights loaded when it names some.

        Raises:
            UserError: unknown keys, wrong types, sizes that cannot work, weights that do not fit.
        """
        config: Any = parse(cls.config_class, cfg or {}, "model")
        source = config.finetuned if config.load_finetuned and config.finetuned else config.pretrained
        if not source:
            log.info("%s: no checkpoint named; at random until one is loaded: %s", cls.arch(), cls.random_parts(config))
            return cls(config)
        path = weights.locate(source, config.checkpoint_sha256)
        saved = cls.files.read(path)
        built_from = cls.files.built_from(saved, config)
        with no_larger_than(saved.tensors, path) if built_from is not config else nullcontext():
            model = cls(built_from)
        cls.files.load_into(model, saved, path).log(path)
        return model

    @classmethod
    def random_parts(cls, config: Any) -> str:
        """Return in words what has no weights of its own."""
        return "all of it"

    def load_checkpoint(self, url_or_filename: str) -> weights.LoadReport:
        """Load a file in any of the layouts that this arch reads.

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
            with no_larger_than(saved.tensors, path):
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
        """Set train mode, frozen encoders excepted: dropout in what does not learn is noise."""
        super().train(mode)
        for module in self.encoder_modules():
            if not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


class LayeredRetriever(Retriever):
    """A retriever that can start from fusion layers of a teacher of its class ("succession")."""

    succession: ClassVar[Succession]

    def init_from_teacher(self, teacher: nn.Module, layers: list[int], share_encoders: bool = False) -> None:
        """Start from a teacher of this class: its fusion layers ``layers`` and all else of the same name.

        Every tensor is copied, so training this model leaves the teacher as it is; with ``share_encoders`` the encoders
        are the teacher's modules.

        Raises:
            UserError: another architecture, a layer that is not there, other sizes.
        """
        if not isinstance(teacher, LayeredRetriever) or type(teacher) is not type(self):
            raise UserError(
                f"model.student.init_from_teacher: a {type(self).__name__} cannot start from a {type(teacher).__name__}"
            )
        depth = teacher.config.fusion.layers
        if len(layers) != self.config.fusion.layers or any(not 0 <= i < depth for i in layers):
            raise UserError(
                f"model.student.init_from_teacher.layers: {layers} must name {self.config.fusion.layers} layers "
                f"of the teacher's 0..{depth - 1}"
            )
        self.load_state_dict(self._taken_over(teacher, layers))
        if share_encoders:
            self._share_encoders(teacher)

    def _taken_over(self, teacher: nn.Module, layers: list[int]) -> dict[str, Tensor]:
        """The teacher's tensors by this model's names; this model's where the teacher lacks an optional module."""
        absent = set(self.succession.optional) - {name for name, _ in teacher.named_children()}
        source, tensors = teacher.state_dict(), {}
        for name, tensor in self.state_dict().items():
            match = re.match(rf"({self.succession.stacks})\.(\d+)\.(.+)$", name)
            donor = f"{match[1]}.{layers[int(match[2])]}.{match[3]}" if match else name
            if name.partition(".")[0] in absent:
                tensors[name] = tensor
                continue
            if donor not in source or source[donor].shape != tensor.shape:
                raise UserError(
                    f"model.student: {name} has no counterpart of its shape in the teacher; give both the "
                    f"same {self.succession.sizes}"
                )
            tensors[name] = source[donor].detach().clone()
        return tensors

    def _share_encoders(self, teacher: Any) -> None:
        """Use the encoder modules of ``teacher``, which is of this class."""
        raise NotImplementedError


class TwoTowers(Retriever):
    """A retriever whose features are the tokens of ``vision_tower`` and ``text_tower``."""

    vision_tower: VisionTower
    text_tower: TextTower

    @classmethod
    @override
    def random_parts(cls, config: Any) -> str:
        weights_of = {"the vision tower": config.vision.weights, "the text tower": config.text.load_weights}
        without = [name for name, given in weights_of.items() if not given]
        return ", ".join([*without, "what works on top of the towers"])

    @override
    def encoder_modules(self) -> list[nn.Module]:
        return [self.vision_tower, self.text_tower]

    @override
    def sharding_units(self) -> list[nn.Module]:
        return [layer for tower in self.encoder_modules() for layer in repeated_layers(tower)]

    @override
    def encoder_signature(self) -> str | None:
        return towers_signature(self.vision_tower, self.text_tower)

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        return ImageFeatures(self.vision_tower(images))

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        return self.encode_token_ids(*self.text_tower.tokenize(texts))

    def encode_token_ids(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        """Return features of tokenised texts: int64 ids ``[B, L]``, bool mask ``[B, L]``."""
        return TextFeatures(self.text_tower(ids, mask), mask.bool())


def model_types(arch: str, *names: str) -> dict[str, str]:
    """Return an arch's ``PRETRAINED_MODEL_CONFIG_DICT``: each type's YAML among the packaged ``configs/models``."""
    return {name: str(packaged_folder("configs") / "models" / f"{arch}_{name}.yaml") for name in names}
