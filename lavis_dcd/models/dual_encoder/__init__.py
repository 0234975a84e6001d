"""Two towers and a joint space: `arch: dual_encoder`."""

from lavis_dcd.models.dual_encoder.model import DualEncoder

__all__ = ["DualEncoder"]
