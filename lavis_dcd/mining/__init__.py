"""``python -m lavis_dcd mine``: score a pool for every query of a data set, and keep the best."""
