"""RingNet: a made-up image-text retriever, and the adapter that lets LAVIS-DCD distil it.

``setup.py`` names this package in the entry-point group ``lavis.plugins``: it is imported with LAVIS, and importing it
registers both.
"""

from lavis_ringnet import adapter, model

__all__ = ["adapter", "model"]
