"""LAVIS's own models as matchers."""
