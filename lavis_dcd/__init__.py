"""LAVIS-DCD: Dynamic Contrastive Distillation of image-text matchers, as a plug-in of LAVIS.

Importing this package is light: it does not import LAVIS. It makes sure that our models, tasks, runners,
builders and processors enter LAVIS's registry as soon as LAVIS itself is imported, before or after us.
"""

from lavis_dcd.hook import install

__all__ = ["__version__"]

__version__ = "0.2.0"

install()
