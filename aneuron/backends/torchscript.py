"""TorchScript files.

Lives here: loading one, without the warning that it is deprecated. Must not be here: which device, which core, what is
kept.
"""

from typing import Any

import torch

from aneuron.backends.unwarned import unwarned


def load_script(file: Any, **settings: Any) -> torch.nn.Module:
    """`torch.jit.load`, without its warning: users are told of TorchScript's end when they make a file, not here."""
    with unwarned():
        return torch.jit.load(file, **settings)  # type: ignore[no-any-return,no-untyped-call]
