"""The base class of all adapters: building, loading, freezing, chunks of bounded memory, the wrapped model's loss."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lavis_dcd.common.address_secrets import without_secrets
from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import asset_path, update_with_tensors
from lavis_dcd.common.schema import parse, plain
from lavis_dcd.common.tensor_files import tensor_faults, tensors_of, tensors_only
from lavis_dcd.matching.adapters.lavis_files import fetched_for_lavis
from lavis_dcd.matching.adapters.vocabulary import local_vocabulary
from lavis_dcd.matching.contract import Matcher, pair_chunks
from lavis_dcd.matching.features import ImageFeatures, TextFeatures
from lavis_dcd.matching.learner import Learner

log = logging.getLogger(__name__)

ENCODERS = "encoders"  # in ``freeze``: every module that encodes pictures or texts


@dataclass
class CommonOptions:
    """Keys that the section of every adapted LAVIS model takes beside LAVIS's own.

    Args:
        tokenizer: a local folder with the vocabulary that LAVIS would fetch from the hub.
        freeze: names of the wrapped model's sub-modules that do not learn; ``encoders`` stands for all that
            encode pictures and texts.
        match_memory_mb: activations of one chunk of ``match`` without gradients, MiB.
    """

    tokenizer: str | None = None
    freeze: list[str] = field(default_factory=list)
    match_memory_mb: float = 1024.0


@dataclass
class AdapterOptions(CommonOptions):
    """The options of an adapter that reads ``sizes`` itself.

    Args:
        sizes: builds another size than LAVIS's own; each adapter's ``build`` says which keys it reads.
    """

    sizes: dict[str, Any] = field(default_factory=dict)


class Adapter(Learner, nn.Module, Matcher):
    """A LAVIS model as a matcher: its sub-modules are used, nothing of them is changed or copied.

    Sub-classes say how pictures and texts are encoded and pairs scored, and

    * ``options_class``: the dataclass of the adapter's keys in the section, an :class:`AdapterOptions`;
    * ``inference_modules``: names of the wrapped model's modules and parameters that scoring uses, whose weights a
      checkpoint must bring;
    * ``build(model_class, section, options)``, and ``check(path)`` for what only the built model shows;
    * ``encoder_modules()``, ``encoder_settings()`` and ``fusion_modules()`` where they are known.

    Args:
        model: the LAVIS model.
        section: the ``model:`` section it was built from, kept for its checkpoint.
        options: the adapter's own keys; read from ``section`` by default.

    Raises:
        UserError: keys of ``section`` or names in ``freeze`` that do not fit.
    """

    options_class: ClassVar[type[CommonOptions]] = AdapterOptions
    inference_modules: ClassVar[tuple[str, ...]] = ()
    # for distributed training: a loss on scores alone leaves the joint space's parameters without a gradient
    find_unused_parameters: bool = True

    def __init__(
        self, model: nn.Module, section: Mapping[str, Any] | None = None, options: CommonOptions | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.section = plain(section or {})
        self.options: CommonOptions = options or self.read_options(self.section, "model")
        self._signature: tuple[list[tuple[int, int]], str] | None = None
        for module in self._frozen_modules():
            module.requires_grad_(False)

    # -- building ------------------------------------------------------------------------------------------------

    @classmethod
    def option_names(cls) -> set[str]:
        """Return the keys that this adapter reads from a section beside LAVIS's own."""
        return set(cls.options_class.__dataclass_fields__)

    @classmethod
    def read_options(cls, section: Mapping[str, Any], path: str) -> CommonOptions:
        """Return the adapter's own keys of ``section``, an ``options_class``.

        Raises:
            UserError: values that do not fit; ``path`` names the section.
        """
        return parse(cls.options_class, {key: section[key] for key in section if key in cls.option_names()}, path)

    @classmethod
    def from_config(cls, model_class: type[nn.Module], section: Any, path: str = "model") -> Adapter:
        """Return the LAVIS model that ``section`` describes, wrapped, with its weights.

        Args:
            model_class: the LAVIS class that the section's ``arch`` names.
            section: over the defaults of its model type.
            path: where the section stands, for messages.

        Raises:
            UserError: keys of the adapter's own that do not fit; sizes that cannot work; weights that leave
                ``inference_modules`` at random.
        """
        options = cls.read_options(plain(section), path)
        try:
            with local_vocabulary(options.tokenizer, f"{path}.tokenizer"), tensors_only():
                model = cls.build(model_class, section, options)
        except ValueError as error:
            raise UserError(f"{path}: {model_class.__name__} cannot be built: {error}") from error
        adapter = cls(model, section, options)
        adapter.check(path)
        adapter._load(section, path)
        return adapter

    @classmethod
    def build(cls, model_class: Any, section: Any, options: Any) -> nn.Module:
        """Return the LAVIS model without weights.

        Args:
            model_class: the LAVIS class.
            section: over the defaults of its model type.
            options: the adapter's own keys, an ``options_class``.

        Raises:
            ValueError: sizes that cannot work; :meth:`from_config` names the section.
        """
        raise NotImplementedError

    def check(self, path: str) -> None:
        """Raise a ``UserError`` for a built model that cannot score pairs; nothing to check by default."""

    # -- loading and keeping -------------------------------------------------------------------------------------

    def _load(self, section: Any, path: str) -> list[str]:
        """Load the weights that ``section`` names, by LAVIS's own loading; return the names that the file left out."""
        finetuned = section.get("finetuned") if section.get("load_finetuned", True) else None
        source = finetuned or section.get("pretrained")
        if not source:
            log.info("%s: no checkpoint named; %s starts from random weights", path, type(self.model).__name__)
            return []
        key = "finetuned" if finetuned else "pretrained"
        return self._read(str(source), f"{path}.{key}", pretrained=not finetuned)

    def load_checkpoint(self, url_or_filename: str) -> list[str]:
        """Load the weights of a file of this model or of LAVIS; return the names of those that it does not bring.

        Raises:
            UserError: a file that is missing, cannot be fetched, holds code or other numbers than the model's, or
                leaves a weight of ``inference_modules`` at random.
        """
        return self._read(url_or_filename, "checkpoint")

    def _read(self, source: str, where: str, pretrained: bool = False) -> list[str]:
        source = asset_path(source)
        if "://" not in source and not Path(source).expanduser().is_file():
            raise UserError(f"{where}: no file {source}")
        names = ("load_from_pretrained", "load_checkpoint") if pretrained else ("load_checkpoint",)
        load = next((getattr(self.model, name) for name in names if hasattr(self.model, name)), None)
        kind = type(self.model).__name__
        if load is None:
            raise UserError(f"{where}: {kind} reads no checkpoints; leave the key empty")
        # by its path: LAVIS would fetch an unchecked file, and log the address with a password in it
        local = str(fetched_for_lavis(source) if "://" in source else Path(source).expanduser())
        source = without_secrets(source)
        try:
            with tensors_only(self._checked):
                message = load(url_or_filename=local)
        except UserError as error:
            raise UserError([f"{where}: {line}" for line in error.faults]) from error
        except (RuntimeError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {source} cannot be loaded into {kind}: {_one_line(error)}") from error
        missing = list(getattr(message, "missing_keys", ()))
        self._refuse_random(missing, source, where)
        return missing

    def _checked(self, content: Any, path: Path) -> dict[str, Any]:
        """Return what LAVIS's loading gets of a file: its tensors, in the layout that the file has.

        Raises:
            UserError: tensors that are not of the model's kind of numbers, or not finite.
        """
        nested = isinstance(content.get("model"), Mapping)
        tensors = tensors_of(content["model"] if nested else content)
        # LAVIS's loading takes "bert." out of names, and fits positions to the model's grid
        by_name = {name.replace("bert.", ""): tensor for name, tensor in tensors.items()} | tensors
        if faults := tensor_faults(by_name, self.model.state_dict(), path, shapes=False):
            raise UserError(faults[:10])
        return {"model": tensors} if nested else dict(tensors)

    def _refuse_random(self, missing: list[str], source: str, where: str) -> None:
        """Raise a ``UserError`` where a file without ``missing`` leaves weights of a score at random."""
        needed = [key for key in missing if self.is_inference_weight(key)]
        if needed:
            raise UserError(
                f"{where}: {source} leaves {len(needed)} weights that scoring needs at random, first {needed[0]}; "
                f"name a retrieval checkpoint of {type(self.model).__name__} in these sizes"
            )

    def is_inference_weight(self, name: str) -> bool:
        """Return whether scoring uses the wrapped model's weight ``name``."""
        if name.endswith("position_ids"):  # a counter, the same in every model
            return False
        return any(name == module or name.startswith(f"{module}.") for module in self.inference_modules)

    def checkpoint(self) -> dict[str, Any]:
        """Return the content of a file of this model, which ``lavis.models.load_model`` reads too."""
        config = {key: value for key, value in self.section.items() if key not in ("finetuned", "pretrained")}
        return {"model": self.model.state_dict(), "arch": self.section.get("arch"), "config": config}

    # -- what learns ---------------------------------------------------------------------------------------------

    def _frozen_modules(self) -> list[nn.Module]:
        modules: list[nn.Module] = []
        for name in self.options.freeze:
            if name == ENCODERS:
                modules += self.encoder_modules()
                continue
            try:
                modules.append(self.model.get_submodule(name))
            except AttributeError as error:
                names = ", ".join([ENCODERS, *(name for name, _ in self.model.named_children())])
                raise UserError(f"model.freeze: {name!r} is no part of the model; parts: {names}") from error
        return modules

    def train(self, mode: bool = True) -> Adapter:
        """Set training mode, frozen modules excepted: dropout in what does not learn is noise."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    @property
    def device(self) -> torch.device:
        """Return the device of the parameters."""
        return next(self.parameters()).device

    def fusion_modules(self) -> list[nn.Module]:
        """Return the modules that ``match`` runs; empty where unknown."""
        return []

    @override
    def fusion_parameters(self) -> int:
        modules = self.fusion_modules()
        if not modules:
            return super().fusion_parameters()
        return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())

    def head_parameter_names(self) -> set[str]:
        """Return the parameters that ``match`` runs, which learn at ``run.head_lr_multiplier`` times the base rate."""
        fast = {id(p) for m in self.fusion_modules() for p in m.parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in fast}

    # -- whose features serve whom -------------------------------------------------------------------------------

    def encoder_settings(self) -> dict[str, Any]:
        """Return settings that shape the features and show neither in the encoders' weights nor in their ``repr``."""
        return {}

    def encoder_signature(self) -> str | None:
        """Return the SHA-256 over the adapter's class, :meth:`encoder_settings`, the encoders' structure and weights.

        ``None`` while an encoder learns, or where the encoders are not known. It is kept until a weight changes.
        """
        if not self.encoders_frozen():
            return None
        modules = self.encoder_modules()
        tensors = [(name, t) for m in modules for name, t in m.state_dict(keep_vars=True).items()]
        state = [(t.data_ptr(), t._version) for _, t in tensors]
        if self._signature is None or self._signature[0] != state:
            digest = hashlib.sha256(type(self).__qualname__.encode())
            digest.update(json.dumps(self.encoder_settings(), sort_keys=True, default=str).encode())
            digest.update("".join(map(repr, modules)).encode())
            update_with_tensors(digest, tensors)
            self._signature = (state, digest.hexdigest())
        return self._signature[1]

    # -- the wrapped model's own training ------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the wrapped model's own loss and its terms on LAVIS's training samples, 0-dim tensors."""
        samples = {"epoch": 0, "iters": 0, "num_iters_per_epoch": 1, **samples}
        output = self.model(samples)
        return {key: value for key, value in output.items() if isinstance(value, Tensor) and value.ndim == 0}

    # -- help for sub-classes ------------------------------------------------------------------------------------

    def in_chunks(self, score: Callable[[Tensor, Tensor], Tensor], pairs: Tensor, bytes_per_pair: int) -> Tensor:
        """Return float32 scores ``[P]``, computed in chunks of at most ``match_memory_mb`` of activations.

        Args:
            score: scores ``[p]`` of pairs of image rows and text rows, int64 ``[p]`` each.
            pairs: int64 ``[P, 2]``, each an (image row, text row).
            bytes_per_pair: activations of one pair.
        """
        chunks = pair_chunks(pairs, bytes_per_pair, self.options.match_memory_mb)
        scores = [score(chunk[:, 0], chunk[:, 1]).float() for chunk in chunks if len(chunk)]
        return torch.cat(scores) if scores else pairs.new_zeros(0, dtype=torch.float32)

    @override
    def encode_images(self, images: Tensor) -> ImageFeatures:
        raise NotImplementedError

    @override
    def encode_texts(self, texts: list[str]) -> TextFeatures:
        raise NotImplementedError


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put ``where``, the field that named a file, before the faults that are found within the ``with`` block."""
    try:
        yield
    except UserError as error:
        raise UserError([f"{where}: {line}" for line in error.faults]) from error


def _one_line(error: Exception) -> str:
    """Return an error's first two lines as one: torch puts what is wrong below a heading."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
