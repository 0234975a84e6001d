"""Steps, checkpoints and resumption; this room imports no model."""
