"""LAVIS's name for the task: ``dcd_retrieval``."""
