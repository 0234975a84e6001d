"""LAVIS models of this package.

Importing LAVIS first lets its own package finish loading before any of our classes registers itself.
"""

import lavis  # noqa: F401
