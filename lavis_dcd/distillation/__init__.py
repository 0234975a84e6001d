"""The method: candidates, selection, weightings and losses. Tensors in, tensors out; torch alone is imported."""
