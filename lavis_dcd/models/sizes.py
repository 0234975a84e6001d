"""Configurations that stand in files of weights: sizes in bounds, and models no larger than the file's tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import one_line, shown

_DEEPEST, _MOST, _LONGEST = 16, 10_000, 4096  # sections inside each other, values, characters of a text
_LARGEST = 1 << 21  # of any number; vocabularies have a million entries at most
# the keys of sizes that no tensor of the file bounds before something is computed with them
_BOUNDS = {"image_size": 2048, "grid": 64, "max_length": 4096, "num_labels": 1 << 16}
_COUNTS = re.compile(r"(width|heads|layers|hidden_size|dim|ratio)$")  # keys of what is never negative
# A model of the file's configuration has the file's tensors; beside them timm's classifier, which is dropped, poolers,
# and position embeddings of a larger grid. Weights that are tied are registered twice.
_SPARE_TENSORS, _SPARE_NUMBERS = 256, 1 << 25


def check_configuration(config: Mapping[str, Any], path: Path) -> None:
    """Refuse the plain configuration in a file where its shape or a number alone could exhaust what reads it.

    Raises:
        UserError: one line for each number out of bounds, or one for too many values, or a text without end.
    """
    faults: list[str] = []
    count = 0
    waiting: list[tuple[str, str, Any, int]] = [("", "", config, 0)]
    while waiting:
        where, key, value, depth = waiting.pop()
        count += 1
        if count > _MOST or depth > _DEEPEST:
            raise UserError(f"{path}: the configuration in it is no list of sizes: too many values; name a whole file")
        if isinstance(value, Mapping):
            waiting += [(f"{where}.{one_line(str(k), 80)}", str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{where}[{number}]", key, v, depth + 1) for number, v in enumerate(value)]
        elif fault := _fault(key, value):
            faults.append(f"{path}: {where.removeprefix('.')} in its configuration {fault}; name a whole file")
    if faults:
        raise UserError(sorted(faults)[:10])


def _fault(key: str, value: Any) -> str | None:
    if isinstance(value, str):
        return f"is a text of {len(value)} characters" if len(value) > _LONGEST else None
    if value is None or isinstance(value, bool):
        return None
    if not isinstance(value, (int, float)):
        return f"is a {type(value).__name__}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, no number"
    largest, least = _BOUNDS.get(key, _LARGEST), 0 if _COUNTS.search(key) else -_LARGEST
    if key.endswith("heads"):
        least = 1
    if key.endswith("eps"):
        largest, least = 1, 0
    return None if least <= value <= largest else f"is {shown(value)}, not between {least:,} and {largest:,}"


class _TooLargeError(Exception):
    """The model being built is larger than the file allows."""


@contextmanager
def no_larger_than(tensors: Mapping[str, Tensor], path: Path) -> Iterator[None]:
    """Stop the building of a model, within the ``with`` block, that outgrows the file it was described in.

    Each parameter is counted when a module gets it, before its memory is written to.

    Args:
        tensors: of the file.
        path: of the file, for messages.

    Raises:
        UserError: more parameters than the file could fill, or sizes of which no model can be built.
    """
    left = [2 * len(tensors) + _SPARE_TENSORS, 2 * sum(t.numel() for t in tensors.values()) + _SPARE_NUMBERS]

    def count(_: nn.Module, __: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            left[0] -= 1
            left[1] -= tensor.numel()
        if min(left) < 0:
            raise _TooLargeError

    hooks = [register_module_parameter_registration_hook(count), register_module_buffer_registration_hook(count)]
    try:
        yield
    except _TooLargeError as error:
        raise UserError(
            f"{path}: the configuration that comes with it describes a larger model than its {len(tensors)} tensors; "
            "name a whole file, or one of this model"
        ) from error
    except UserError as error:
        faults = (line if str(path) in line else f"{path}: by its own configuration: {line}" for line in error.faults)
        raise UserError(faults) from error
    except Exception as error:  # whatever the modules of transformers and timm stumble over
        reason = one_line(" ".join(str(error).split()), 300) or type(error).__name__
        raise UserError(
            f"{path}: no model of the configuration that comes with it can take its tensors ({reason}); name a whole "
            "file"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
