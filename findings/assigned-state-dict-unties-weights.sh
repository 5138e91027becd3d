#!/usr/bin/env bash
# `load_state_dict(..., assign=True)` and `.to("meta")` untie tied weights.
# Library: torch 2.13.0, Python 3.11.
# Guess: modules that share a Parameter still share it, as after .to(dtype), to_empty() and a plain load_state_dict.
# Happens: each name gets a Parameter of its own: an embedding and the output layer tied to it take the memory twice, and
#   what changes one of them later (quantising, max_norm, an in-place update) leaves the other as it was.
# Who meets it: loading on "meta" first, or with `torch.load(mmap=True)`, the ways to start a server without a second copy
#   of the weights. Tie again after loading.
# Seen: plain True, to(float64) True, to_empty True, meta False, assign False
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import torch


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(4, 2)
        self.output = torch.nn.Linear(2, 4, bias=False)
        self.output.weight = self.words.weight


def loaded(**settings):
    model = Tied()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, **settings)
    return model


models = {
    "plain": loaded(),
    "to(float64)": Tied().to(torch.float64),
    "to_empty": Tied().to_empty(device="cpu"),
    "meta": Tied().to("meta"),
    "assign": loaded(assign=True),
}
tied = {name: model.words.weight is model.output.weight for name, model in models.items()}
print(*(f"{name} {value}" for name, value in tied.items()))
assert tied == {"plain": True, "to(float64)": True, "to_empty": True, "meta": False, "assign": False}
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
