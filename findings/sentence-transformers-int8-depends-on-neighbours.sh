#!/usr/bin/env bash
# `encode(texts, precision="int8")` scales by the batch at hand: a text's embedding depends on its neighbours; and an
# empty list gives shape (0,).
# Library: sentence-transformers 6.2.0, numpy 2.4.6, torch 2.13.0, Python 3.11.
# Guess: a scale for each text, or a fixed one; one text works; no text gives (0, dimensions).
# Happens: the range of each dimension is taken from the texts of that call, so vectors of two calls cannot be compared
#   (a log line, no warning); one text alone raises ValueError. `encode([])` gives a float64 array of shape (0,), which
#   cannot be joined to (n, d). Use `quantize_embeddings(..., ranges=...)` on float embeddings.
# Who meets it: embedding services with dynamic batching: who shares the batch changes the stored vector.
# Seen: "a" beside "b" and beside "c": different vectors; alone: ValueError; empty: (0,) float64
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'sentence-transformers==6.2.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import logging

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

logging.disable(logging.CRITICAL)
words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "[UNK]": 3}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
weights = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
model = SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu")

beside_b, beside_c = (model.encode(["a", other], precision="int8")[0] for other in "bc")
print("a beside b", beside_b, "beside c", beside_c)
assert not np.array_equal(beside_b, beside_c)
assert np.array_equal(*(model.encode(["a", other])[0] for other in "bc"))
try:
    model.encode(["a"], precision="int8")
except ValueError as error:
    print("alone:", type(error).__name__)
else:
    raise AssertionError("one text alone can be quantized now")
empty = np.asarray(model.encode([]))
print("empty:", empty.shape, empty.dtype)
assert empty.shape == (0,) and empty.dtype == np.float64
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
