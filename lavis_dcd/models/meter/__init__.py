"""METER: `arch: meter_retrieval`."""

from lavis_dcd.models.meter.model import MeterRetrieval

__all__ = ["MeterRetrieval"]
