"""What the benchmarks share: a process of its own per figure, its memory, the machine, tables, files, a chart."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
Row = Mapping[str, Any]

_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")


def in_child(work: Callable[..., T], *args: Any) -> T:
    """``work(*args)`` in a process that starts and ends with it, so that no figure hides another's memory.

    The process is forked where the system can: modules are imported once. Nothing here may have used torch before.

    Raises:
        SystemExit: the process was killed, which is what a system does that has run out of memory.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool:
            raise SystemExit("the measuring process was killed (out of memory?); choose smaller counts") from None


class PeakMemory:
    """Memory of this process inside a ``with`` block, in bytes.

    ``start`` is what was resident at its beginning, ``extra`` how far the peak rose above that.
    """

    def __enter__(self) -> PeakMemory:
        release_memory()
        self.start = _resident("VmRSS")
        if _CLEAR_PEAK.exists():
            _CLEAR_PEAK.write_text("5")  # the system's own way to let the peak start anew
        return self

    def __exit__(self, *error: object) -> None:
        self.extra = max(0, _resident("VmHWM") - self.start)


def release_memory() -> None:
    """Gives freed memory back to the system, which otherwise counts it as used, and hides what reuses it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int:
    """What this process holds now, in bytes, once freed memory is given back."""
    release_memory()
    return _resident("VmRSS")


def _resident(field: str) -> int:
    if _STATUS.exists():
        return next(1024 * int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine(precision: str = "float32") -> dict[str, Any]:
    """Where the figures are measured."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def _processor() -> str:
    if (cpus := Path("/proc/cpuinfo")).exists():
        for line in cpus.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# -- command lines and results -----------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    found.add_argument(
        "--threads", type=int, metavar="N", help="threads that torch may use (default: as torch comes, all cores)"
    )
    found.add_argument("--seed", type=int, default=0, help="of the random weights and inputs (default: 0)")
    return found


def parsed(of: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and the number of threads set for this process and those that it forks."""
    options = of.parse_args(argv)
    if options.threads is not None:
        if options.threads < 1:
            of.error(f"--threads: {options.threads}, at least 1 is needed")
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    return options


def report(name: str, settings: Mapping[str, Any], rows: Sequence[Row], columns: Mapping[str, str], path: Path | None):
    """Machine, settings and table on the standard output; the same figures as JSON where a path is given.

    Args:
        columns: the key of a row -> ``heading|format``, in order.
    """
    where = machine()
    facts = [f"{key}: {value}" for key, value in {**where, **settings}.items()]
    sys.stdout.write(f"{name}\n{'; '.join(facts)}\n\n{table(rows, columns)}\n")
    sys.stdout.flush()
    if path is not None:
        content = {"benchmark": name, "machine": where, "settings": dict(settings), "rows": list(rows)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def progress(text: str) -> None:
    """A line on the standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table with aligned columns; what a row lacks is left empty."""
    heads = [column.split("|")[0] for column in columns.values()]
    forms = [column.split("|")[1] for column in columns.values()]
    lines = [[_cell(row.get(key), form) for key, form in zip(columns, forms, strict=True)] for row in rows]
    widths = [max(3, *(len(line[i]) for line in [heads, *lines])) for i in range(len(heads))]
    right = [form != "s" for form in forms]
    ruler = ["-" * (width - to_right) + ":" * to_right for width, to_right in zip(widths, right, strict=True)]
    aligned = [
        [cell.rjust(width) if to_right else cell.ljust(width)
         for cell, width, to_right in zip(line, widths, right, strict=True)]
        for line in [heads, ruler, *lines]
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def _cell(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


# -- the chart ---------------------------------------------------------------------------------------------------

_BAR, _GAP, _NAMES, _PANEL = 18, 8, 290, 300


def bar_chart(title: str, names: Sequence[str], panels: Mapping[str, Sequence[float]], path: Path) -> None:
    """Bars side by side, one panel per measure, as an SVG file that any browser shows.

    Args:
        names: of the rows, from above.
        panels: a measure's name -> its value in each row.
    """
    height = 60 + len(names) * (_BAR + _GAP)
    width = _NAMES + len(panels) * (_PANEL + 30)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    tops = [52 + i * (_BAR + _GAP) for i in range(len(names))]
    parts += [
        f'<text x="{_NAMES - 10}" y="{top + 13}" text-anchor="end">{escape(name)}</text>'
        for top, name in zip(tops, names, strict=True)
    ]
    for number, (measure, values) in enumerate(panels.items()):
        left = _NAMES + number * (_PANEL + 30)
        longest = max(values) or 1.0
        parts.append(f'<text x="{left}" y="42" fill="#555">{escape(measure)}</text>')
        for top, value in zip(tops, values, strict=True):
            length = (_PANEL - 70) * value / longest
            colour = ("#3b6fb6", "#c2703d")[number % 2]
            parts.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>')
            parts.append(f'<text x="{left + length + 5:.1f}" y="{top + 13}">{_short(value)}</text>')
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
