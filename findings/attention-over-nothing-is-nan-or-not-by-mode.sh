#!/usr/bin/env bash
# A row whose positions are all padding: nn.MultiheadAttention gives NaN or numbers by `need_weights` and by grad mode.
# Library: torch 2.13.0, Python 3.11, CPU.
# Guess: NaN always (a softmax over nothing), or, since scaled_dot_product_attention gives 0 for it, never.
# Happens: NaN with need_weights=True (the default), finite with False and grad on, NaN again with False under
#   inference_mode (the fast path). nn.TransformerEncoderLayer: finite with grad on, NaN when it is served.
# Who meets it: empty texts and dummy rows that fill a compiled batch; a check in a notebook with grad on passes.
# Seen: weights True: NaN, NaN; weights False: finite, NaN; encoder layer: finite, NaN (grad on, inference_mode)
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch

attention = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
x = torch.randn(2, 3, 8)
padding = torch.tensor([[False] * 3, [True] * 3])  # the second text is empty
computed = {
    "weights True": lambda: attention(x, x, x, key_padding_mask=padding)[0],
    "weights False": lambda: attention(x, x, x, key_padding_mask=padding, need_weights=False)[0],
    "encoder layer": lambda: layer(x, src_key_padding_mask=padding),
}
seen = {}
for name, compute in computed.items():
    with_grad = compute()
    with torch.inference_mode():
        served = compute()
    assert with_grad[0].isfinite().all() and served[0].isfinite().all()
    seen[name] = tuple("NaN" if y[1].isnan().any() else "finite" for y in (with_grad, served))
    print(name, *seen[name])
assert seen == {
    "weights True": ("NaN", "NaN"), "weights False": ("finite", "NaN"), "encoder layer": ("finite", "NaN")
}
q = torch.randn(1, 2, 3, 4)
nothing = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
assert (torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=nothing) == 0).all()
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
