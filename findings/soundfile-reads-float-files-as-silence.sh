#!/usr/bin/env bash
# `soundfile.read(f, dtype="int16")` of a WAV file that holds floats gives 0 and 1, not -32768 to 32767.
# Library: soundfile 0.14.0, numpy 2.4.6, Python 3.11.
# Guess: scaled, as a PCM file is when it is read as float.
# Happens: floats are rounded, not scaled: a normal recording becomes zeros, silently; int32 the same. The other way
#   round PCM read as float (the default is float64) is scaled to -1 to 1.
# Who meets it: speech models fed with int16 from uploads, which come as PCM from one client and as float from another.
#   Read as float32 and scale.
# Seen: float file [0, 0, 1] for [0.5, -0.25, 0.999]; PCM file [16384, -8192, 32735]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'soundfile==0.14.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import io

import numpy as np
import soundfile

samples = np.array([0.5, -0.25, 0.999])
seen = {}
for subtype in ("FLOAT", "PCM_16"):
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, subtype=subtype, format="WAV")
    for dtype in ("int16", "float32"):
        file.seek(0)
        seen[subtype, dtype] = soundfile.read(file, dtype=dtype)[0]
print("float file", seen["FLOAT", "int16"], "PCM file", seen["PCM_16", "int16"], "for", samples)
assert seen["FLOAT", "int16"].tolist() == [0, 0, 1]
assert np.allclose(seen["PCM_16", "int16"], samples * 32768, atol=2)
assert np.allclose(seen["FLOAT", "float32"], seen["PCM_16", "float32"], atol=1e-4)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
