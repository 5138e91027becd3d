#!/usr/bin/env bash
# `net.half()` keeps complex parameters, `net.to(torch.float16)` throws their imaginary part away.
# Library: torch 2.13.0, Python 3.11.
# Guess: the two are the same; complex parameters become complex32, or stay.
# Happens: `half()`, `bfloat16()`, `float()` and `double()` cast what is floating and leave what is complex. `to(dtype)`
#   casts both: a complex parameter becomes a real one. There is a UserWarning, once in the process, and the module runs:
#   with other results.
# Who meets it: models with Fourier filters or complex embeddings (FNO, RotatE) whose server casts them with `to`.
# Seen: half() complex64 deviates 0.0, to(float64) float64 deviates 1.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch


class Filter(torch.nn.Module):
    """Multiplies the spectrum."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((5,), 1j))

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)


x = torch.eye(8)[:1]
with torch.inference_mode():
    expected = Filter()(x)
    assert Filter().half().weight.dtype is torch.complex64
    assert torch.equal(Filter().half()(x), expected)
    cast = Filter().to(torch.float64)
    deviation = float((cast(x) - expected).abs().max() / expected.abs().max())
print(f"half() complex64 deviates 0.0, to(float64) {str(cast.weight.dtype)[6:]} deviates {deviation:.1f}")
assert cast.weight.dtype is torch.float64
assert deviation > 0.5
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
