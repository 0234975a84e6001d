"""The repeated layers of an encoder."""

from __future__ import annotations

from torch import nn


def repeated_layers(module: nn.Module) -> list[nn.Module]:
    """The elements of every ``ModuleList`` or ``Sequential`` in ``module`` that has several, all of one class.

    In the order of their names, which in a stack is that in which they run; a layer's own stacks are part of it.
    """
    if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and len({type(m) for m in module}) == 1:
        return list(module)
    return [layer for child in module.children() for layer in repeated_layers(child)]
