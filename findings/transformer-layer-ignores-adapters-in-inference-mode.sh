#!/usr/bin/env bash
# nn.TransformerEncoderLayer ignores a replaced submodule (an adapter) in eval under no_grad or inference_mode, and uses it
# with grad on.
# Library: torch 2.13.0, Python 3.11.
# Guess: a submodule that is replaced by one with another `forward` is called, in every mode.
# Happens: the fast path reads the weights of linear1, linear2 and the norms and never calls the modules: what a LoRA
#   layer, a patched `forward` or another norm adds is missing, without a warning. Forward hooks are looked for, and switch
#   the fast path off. `MultiheadAttention.out_proj` is never called, in training neither.
# Who meets it: every server, since it runs in inference_mode, while the comparison in a notebook runs with grad on.
#   `torch.backends.mha.set_fastpath_enabled(False)` mends the first, nothing the second.
# Seen: adapter on linear1 and norm2: used with grad True, in inference_mode False, with the fast path off True; out_proj: False
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.linspace(-5, 5, self.out_features)


class AdaptedNorm(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 5


def replace(layer, name):
    parent, _, leaf = name.rpartition(".")
    old = getattr(layer.get_submodule(parent), leaf)
    new = AdaptedNorm(8) if "norm" in name else Adapted(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    setattr(layer.get_submodule(parent), leaf, new.eval())


x = torch.randn(2, 3, 8)
for name, expected in (("linear1", (True, False, True)), ("norm2", (True, False, True)), ("self_attn.out_proj", (False,) * 3)):
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    plain = layer(x)
    replace(layer, name)
    with_grad = layer(x)
    with torch.inference_mode():
        served = layer(x)
        torch.backends.mha.set_fastpath_enabled(False)
        slow = layer(x)
        torch.backends.mha.set_fastpath_enabled(True)
    used = tuple(not torch.allclose(y, plain, atol=1e-5) for y in (with_grad, served, slow))
    print(name, "used with grad", used[0], "in inference_mode", used[1], "with the fast path off", used[2])
    assert used == expected
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
