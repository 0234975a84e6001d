"""From pictures to tensors, and from captions to text."""
