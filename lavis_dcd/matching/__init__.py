"""Scores of pictures against texts: the contract of a matcher, features, attention, adapters."""
