"""Scenes of coloured shapes that the package draws itself."""
