#!/usr/bin/env bash
# Transformers' Wav2Vec2FeatureExtractor normalises a clip together with the zeros it is padded with.
# Library: transformers 5.24.0, numpy 2.4.6, Python 3.11.
# Guess: each clip is normalised by its own samples, then padded with 0.
# Happens: with return_attention_mask=False, the default, padding comes first: mean and variance include the zeros, so a
#   clip's values depend on the longest clip beside it, and the padding is not 0 either (the models of this setting ask for
#   0). With return_attention_mask=True both are right.
# Who meets it: speech services that pad and batch. Extract features of each clip alone, then pad.
# Seen: mask False: differs by 2.6, padded with -0.37; mask True: 0.0, padded with 0.0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'transformers==5.24.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import numpy as np
from transformers import Wav2Vec2FeatureExtractor

clip = np.random.RandomState(0).randn(1000).astype(np.float32) + 1
longer = np.random.RandomState(1).randn(4000).astype(np.float32)
seen = {}
for mask in (False, True):
    extract = Wav2Vec2FeatureExtractor(return_attention_mask=mask)
    alone = extract(clip, sampling_rate=16000, return_tensors="np").input_values[0]
    both = extract([clip, longer], sampling_rate=16000, padding=True, return_tensors="np").input_values[0]
    seen[mask] = float(np.abs(both[:1000] - alone).max()), float(both[-1])
    print("mask", mask, "differs by", round(seen[mask][0], 2), "padded with", round(seen[mask][1], 2))
assert Wav2Vec2FeatureExtractor().return_attention_mask is False
assert seen[False][0] > 1 and abs(seen[False][1]) > 0.1
assert seen[True] == (0, 0)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
