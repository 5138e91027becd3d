"""Tensors in tuples, named tuples, lists and dicts: flat, and back."""

from typing import Any

import torch


def flatten(value: Any, leaves: list[Any]) -> Any:
    """Append the leaves; the answer is the same nesting with their indices in their places."""
    if isinstance(value, dict):
        return {key: flatten(each, leaves) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(flatten(each, leaves) for each in value))
    if isinstance(value, (tuple, list)):
        return type(value)(flatten(each, leaves) for each in value)
    leaves.append(value)
    return len(leaves) - 1


def tensors(value: Any) -> list[torch.Tensor]:
    leaves: list[torch.Tensor] = []
    flatten(value, leaves)
    return leaves


def rebuild(nesting: Any, leaves: list[Any]) -> Any:
    """What `flatten` took apart, of other leaves."""
    if isinstance(nesting, dict):
        return {key: rebuild(each, leaves) for key, each in nesting.items()}
    if isinstance(nesting, tuple) and hasattr(nesting, "_fields"):
        return type(nesting)(*(rebuild(each, leaves) for each in nesting))
    if isinstance(nesting, (tuple, list)):
        return type(nesting)(rebuild(each, leaves) for each in nesting)
    return leaves[nesting]
