#!/usr/bin/env bash
# librosa takes a batch for the channels of one signal: mfcc, power_to_db, chroma, onset strength, normalize and trim of
# one recording depend on the others.
# Library: librosa 0.11.0, numpy 2.4.6, Python 3.11.
# Guess: leading dimensions are independent, as in melspectrogram.
# Happens: `top_db` and `ref=np.max` look at the loudest value of all (so mfcc too), chroma estimates one tuning for all,
#   `util.normalize` works along axis 0 by default, `effects.trim` cuts where all are silent. melspectrogram, rms and yin
#   are by row.
# Who meets it: pre-processing that stacks recordings for a model: a quiet one beside a loud one loses its detail.
# Seen: relative change of the first of two, the second 100,000 times louder: mfcc 1.54, power_to_db 1.40, chroma 0.10,
#   normalize 1.00; melspectrogram 1e-07, rms 0, yin 0
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'librosa==0.11.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import librosa
import numpy as np

pair = np.random.default_rng(0).standard_normal((2, 8000)).astype(np.float32)
pair[1] *= 1e5


def influence(compute):
    alone, together = compute(pair[0]), compute(pair)[0]
    return float(np.abs(alone - together).max() / np.abs(alone).max())


by_row = {
    "melspectrogram": influence(lambda y: librosa.feature.melspectrogram(y=y, sr=16000)),
    "rms": influence(lambda y: librosa.feature.rms(y=y)),
    "yin": influence(lambda y: librosa.yin(y, fmin=60, fmax=400, sr=16000)),
}
mixed = {
    "mfcc": influence(lambda y: librosa.feature.mfcc(y=y, sr=16000)),
    "power_to_db": influence(lambda y: librosa.power_to_db(librosa.feature.melspectrogram(y=y, sr=16000))),
    "chroma": influence(lambda y: librosa.feature.chroma_stft(y=y, sr=16000)),
    "normalize": influence(librosa.util.normalize),
}
print("relative change by row:", {name: f"{value:.0e}" for name, value in by_row.items()})
print("relative change, mixed:", {name: f"{value:.2f}" for name, value in mixed.items()})
assert max(by_row.values()) < 1e-4 and min(mixed.values()) > 0.01
quiet = np.zeros((2, 16000), np.float32)
quiet[0, 8000:12000] = quiet[1, 2000:15000] = 1
assert librosa.effects.trim(quiet)[0].shape[-1] > 2 * librosa.effects.trim(quiet[0])[0].shape[-1]
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
