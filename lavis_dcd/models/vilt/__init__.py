"""ViLT: `arch: vilt_retrieval`."""

from lavis_dcd.models.vilt.model import ViltRetrieval

__all__ = ["ViltRetrieval"]
