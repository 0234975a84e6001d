"""Randomness as a function of where the job stands: a resumed job draws what the first one would have."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

import numpy as np
import torch

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.texts import shown

LARGEST_SEED = 2**32 - 1  # that NumPy takes; torch takes larger ones


def seed_fault(value: object, field: str) -> str | None:
    """Return why `value` cannot be a job's seed, as a line that names `field`; None where it can."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED:
        return None
    return f"{field}: {shown(value)} is no seed; give a whole number from 0 to {LARGEST_SEED:,}"


def seed_for(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all parts (say the job's seed, "step", and the step's number)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (the CPU and every CUDA device).

    Raises:
        UserError: `seed` is no whole number, negative, or has more than 64 bits.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise UserError(f"run.seed: {shown(seed)} is no seed; give a whole number from 0 to {LARGEST_SEED:,}")
    seed_host(seed)
    # torch.manual_seed would keep the call, traceback and all, for a device that may never come: memory that grows
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def seed_host(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator: all that a sample draws from, and cheap enough for each."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every generator, as tensors and plain containers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def check_rng_state(state: Any) -> None:
    """Raise a ``ValueError`` where `set_rng_state` would not take `state`; the generators in use stay as they are."""
    try:
        version, keys, gauss = state["python"]
        _check(len(keys) == 625 and all(type(key) is int and 0 <= key < 2**32 for key in keys), "of Python's generator")
        _check(version == 3 and keys[-1] <= 624, "of Python's generator")
        _check(gauss is None or _is_finite(gauss), "of Python's generator")
        kind, numpy_keys, position, has_gauss, cached = state["numpy"]
        _check(numpy_keys.dtype == torch.int64 and numpy_keys.shape == (624,), "of NumPy's generator")
        _check(bool(((numpy_keys >= 0) & (numpy_keys < 2**32)).all()), "of NumPy's generator")
        _check(type(position) is int and 0 <= position <= 624, "of NumPy's generator")
        _check(type(has_gauss) is int and has_gauss in (0, 1) and _is_finite(cached), "of NumPy's generator")
        _check(kind == "MT19937", "of NumPy's generator")
        torch.Generator().set_state(state["torch"])
        _check_cuda(state["cuda"])
    except (TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError("is no state of the generators") from error


def _check_cuda(states: Any) -> None:
    _check(isinstance(states, list) and all(isinstance(state, torch.Tensor) for state in states), "of CUDA's")
    if torch.cuda.is_available() and len(states) == torch.cuda.device_count():
        for number, state in enumerate(states):
            torch.Generator(f"cuda:{number}").set_state(state)


def _check(sound: bool, whose: str) -> None:
    if not sound:
        raise ValueError(f"is no state {whose}")


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned. CUDA states are skipped where the number of devices differs."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, numpy_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, numpy_keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
