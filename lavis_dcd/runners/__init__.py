"""LAVIS's name for the training loop: ``runner_dcd``."""
