"""Equal to the bit."""

import torch


def same_tensors(a, b):
    """Whether two mappings, not empty, hold the same tensors by the same names."""
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_weights(a, b):
    """Whether two TunedWeights hold the same tensors."""
    return same_tensors(a.queries, b.queries) and same_tensors(a.temporal, b.temporal)
