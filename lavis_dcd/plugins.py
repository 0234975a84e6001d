"""Fill LAVIS's registry: with our own modules, and those of third parties."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from importlib.metadata import entry_points

from PIL import ImageFile

from lavis_dcd.common.errors import UserError
from lavis_dcd.common.files import cache_root
from lavis_dcd.common.texts import one_line

log = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "lavis.plugins"

_MODULES = (
    "lavis_dcd.matching.adapters.albef_blip",
    "lavis_dcd.matching.adapters.blip2",
    "lavis_dcd.matching.adapters.clip",
    "lavis_dcd.models.dual_encoder",
    "lavis_dcd.models.meter",
    "lavis_dcd.models.vilt",
    "lavis_dcd.models.dcd",
    "lavis_dcd.processors.images",
    "lavis_dcd.processors.vilt_images",
    "lavis_dcd.processors.captions",
    "lavis_dcd.datasets.shape_scenes.builder",
    "lavis_dcd.datasets.image_text_retrieval",
    "lavis_dcd.datasets.coco_captions",
    "lavis_dcd.datasets.unpaired",
    "lavis_dcd.tasks.dcd_retrieval",
    "lavis_dcd.runners.runner_dcd",
)


def register_all() -> None:
    """Put all of ours, then what the entry points of `lavis.plugins` name, into LAVIS's registry.

    May be called any number of times. LAVIS's cache root becomes `lavis_dcd.common.files.cache_root()`, and
    its model and data-set zoos, snapshots taken at import, list what was registered since. It runs inside
    `import lavis`, so a third party's broken plug-in is only logged here; `load_plugins` raises.
    """
    for name in _MODULES:
        importlib.import_module(name)
    for line in _entry_point_faults():
        log.warning(line)
    _set_cache_root()
    # one of LAVIS's data sets switches this on for the whole process: a picture cut short would train as half grey
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    # one line per odd entry of a TIFF or an EXIF block, tens of thousands a file, of which none is about pixels
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
    refresh_zoos()


def load_plugins(modules: Iterable[str]) -> None:
    """Import further modules that register themselves (`--plugins`), after ours and those of entry points.

    Raises:
        UserError: one line per module that cannot be imported.
    """
    faults = _entry_point_faults()
    for name in modules:
        faults += _import_faults(name, "--plugins", partial(importlib.import_module, name))
    if faults:
        raise UserError(faults)
    refresh_zoos()


def refresh_zoos() -> None:
    """Make `lavis.models.model_zoo` and `lavis.datasets.builders.dataset_zoo` list all that is registered."""
    from lavis.common.registry import registry
    from lavis.datasets.builders import dataset_zoo
    from lavis.models import model_zoo

    for name, model in registry.mapping["model_name_mapping"].items():
        model_zoo.model_zoo[name] = list(getattr(model, "PRETRAINED_MODEL_CONFIG_DICT", {}))
    for name, builder in registry.mapping["builder_name_mapping"].items():
        dataset_zoo.dataset_zoo[name] = list(getattr(builder, "DATASET_CONFIG_DICT", {}))


def _entry_point_faults() -> list[str]:
    faults: list[str] = []
    for point in entry_points(group=ENTRY_POINT_GROUP):
        faults += _import_faults(point.value, f"entry point {ENTRY_POINT_GROUP}: {point.name}", point.load)
    return faults


def _import_faults(name: str, origin: str, load: Callable[[], object]) -> list[str]:
    # A plug-in is foreign code: whatever it raises is its own fault, told in one line. One that calls sys.exit must
    # not end the job, as if it were done.
    try:
        load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if isinstance(error, SystemExit):
            reason = f"it called sys.exit({reason}); a plug-in must raise an error or return"
        return [one_line(f"{origin}: cannot import {name}: {type(error).__name__}: {reason}")]
    return []


def _set_cache_root() -> None:
    from lavis.common.registry import registry

    try:
        root = cache_root()
    except UserError:  # no home folder; whoever needs the cache says so, and most jobs do not
        return
    # register_path refuses a name that it has, and LAVIS has put a path on its authors' machine there.
    registry.mapping["paths"]["cache_root"] = str(root)
