#!/usr/bin/env bash
# A FastAPI endpoint without a return annotation that returns a tensor answers 200 with `{}`.
# Library: fastapi 0.165.0, torch 2.13.0, Python 3.11.
# Guess: 500, as for a NumPy array, because a tensor cannot be serialised.
# Happens: `jsonable_encoder` falls back to `vars(obj)`, and a tensor has an empty `__dict__`: the answer is `{}` with
#   status 200, also for each tensor inside a dict or list. With `-> list[float]` the numbers come. A tensor of shape
#   (n, 2) is taken for pairs of a dict and raises.
# Who meets it: whoever forgets `.tolist()` in a handler: clients get 200 and nothing.
# Seen: tensor 200 {} / dict 200 {"y":{}} / array 500 / annotated 200 [1.0,1.0,1.0] / pairs 500
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'fastapi==0.165.0' 'numpy==2.4.6' 'torch==2.13.0'

cat >"$dir/check.py" <<'PY'
import asyncio

import numpy as np
import torch
from fastapi import FastAPI

app = FastAPI()


@app.get("/tensor")
def tensor():
    return torch.ones(3)


@app.get("/dict")
def in_a_dict():
    return {"y": torch.ones(3)}


@app.get("/array")
def array():
    return np.ones(3)


@app.get("/annotated")
def annotated() -> list[float]:
    return torch.ones(3)


@app.get("/pairs")
def pairs():
    return torch.ones(4, 2)


async def get(path):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": []}
    try:
        await app(scope | {"client": ("client", 1), "server": ("server", 80)}, receive, send)
    except Exception:  # starlette answers 500, then raises for the server's log
        pass
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


seen = {name: asyncio.run(get("/" + name)) for name in ("tensor", "dict", "array", "annotated", "pairs")}
for name, (status, body) in seen.items():
    print(name, status, body)
assert seen["tensor"] == (200, "{}")
assert seen["dict"] == (200, '{"y":{}}')
assert seen["annotated"] == (200, "[1.0,1.0,1.0]")
assert seen["array"][0] == seen["pairs"][0] == 500
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
