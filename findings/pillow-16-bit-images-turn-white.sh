#!/usr/bin/env bash
# Pillow's `convert("L")` and `convert("RGB")` of a 16-bit greyscale image clip at 255 instead of scaling.
# Library: pillow 13.0.0, numpy 2.4.6, Python 3.11.
# Guess: 16 bits are scaled to 8: 40000 becomes 156.
# Happens: everything above 255 is 255: X-ray, depth and microscope images become white, and
#   `Image.open(f).convert("RGB")`, which every image model's example begins with, does it without a warning.
# Who meets it: image services that accept PNG and TIFF. Divide by 257 first when `mode` begins with "I;16".
# Seen: [0, 300, 40000, 65535] -> L [0, 255, 255, 255], RGB the same
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'pillow==13.0.0' 'numpy==2.4.6'

cat >"$dir/check.py" <<'PY'
import io

import numpy as np
from PIL import Image

pixels = np.array([[0, 300, 40000, 65535]], dtype=np.uint16)
file = io.BytesIO()
Image.fromarray(pixels).save(file, "PNG")
image = Image.open(file)
grey, rgb = np.asarray(image.convert("L")), np.asarray(image.convert("RGB"))[..., 0]
print(image.mode, pixels.tolist(), "-> L", grey.tolist(), "RGB", rgb.tolist())
assert image.mode == "I;16"
assert grey.tolist() == rgb.tolist() == [[0, 255, 255, 255]]
assert np.array_equal(np.asarray(image), pixels)
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
