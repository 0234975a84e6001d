"""Recall of a matcher on a data set: every pair, or a shortlist that the fusion reranks."""
