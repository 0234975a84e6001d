"""Builders and data sets that LAVIS lacks, and checks of annotations and pictures."""
