"""Files that run something when they are read carelessly."""

from __future__ import annotations

import os
from pathlib import Path

import torch


class Writes(torch.nn.Module):
    """As TorchScript, makes a file and fills it when it is read."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.w = torch.ones(1)

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.w, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.training = state[0], state[2]
        # kept, or the compiler would leave it out
        self.w = torch.from_file(self.path, shared=True, size=4, dtype=torch.uint8).fill_(65)

    def forward(self, x):
        return x + self.w


def torchscript(path: Path, marker: Path) -> Path:
    """Write an archive that fills ``marker`` when it is read."""
    torch.jit.script(Writes(str(marker))).save(str(path))
    return path


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def makes_folder(marker: Path) -> Calls:
    """Return what makes the folder ``marker`` when it is unpickled."""
    return Calls(os.mkdir, str(marker))
