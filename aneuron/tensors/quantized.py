"""Quantized tensors: what their integers stand for, and joining them.

Lives here: scale, zero point and axis, and what torch does not do by itself: `torch.cat` goes over to the scale of the
first without a word, rounds large 32-bit integers, and takes none with a scale for each channel; `torch.empty` makes
none at all. Must not be here: tensors of other kinds.
"""

from collections.abc import Hashable, Sequence

import torch

QUANTIZED = frozenset((torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4))
_WHOLE = (torch.per_tensor_affine, torch.per_tensor_symmetric)
_CHANNELS = (torch.per_channel_affine, torch.per_channel_symmetric)


def grid(tensor: torch.Tensor, dim: int) -> Hashable:
    """Scale and zero point, or the axis and those of all channels: equal for tensors that can be one, cut along `dim`.

    Raises `ValueError`, to follow the tensor's name, if it can neither be cut nor joined along it.
    """
    scheme = tensor.qscheme()
    if scheme in _WHOLE:
        return tensor.q_scale(), tensor.q_zero_point()
    if scheme not in _CHANNELS or tensor.dtype not in (torch.quint8, torch.qint8, torch.qint32):
        raise ValueError(f"is quantized as {tensor.dtype} ({scheme}), which cannot be cut; pass x.dequantize()")
    axis = tensor.q_per_channel_axis()
    if axis % tensor.ndim == dim % tensor.ndim:
        raise ValueError(
            f"is quantized with a scale for each index along dim {axis}, which counts the rows and cannot be cut then; "
            "pass x.dequantize()"
        )
    return axis, tuple(tensor.q_per_channel_scales().tolist()), tuple(tensor.q_per_channel_zero_points().tolist())


def joined(pieces: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """Tensors of one grid, one after the other, integer by integer."""
    shape = list(pieces[0].shape)
    shape[dim] = sum([piece.shape[dim] for piece in pieces])
    whole, start = torch.empty_quantized(shape, pieces[0]), 0
    for piece in pieces:
        whole.narrow(dim, start, piece.shape[dim]).copy_(piece)
        start += piece.shape[dim]
    return whole
