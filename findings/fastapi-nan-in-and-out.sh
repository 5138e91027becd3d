#!/usr/bin/env bash
# `row: list[float]` lets NaN in, written in four ways; whether NaN in an answer is 500 or null depends on an annotation.
# Library: fastapi 0.165.0, pydantic 2.14.4, Python 3.11.
# Guess: NaN is no JSON, so the request gets 422; and an answer that holds NaN is 500 in any case.
# Happens: the literals NaN and 1e999 and the strings "nan" and "Infinity" are accepted, and `true` is 1.0. An endpoint
#   without a return annotation answers 500, one with `-> list[float]` answers 200 with null for NaN and infinity.
# Who meets it: one caller's NaN reaches the model, and through a batch norm or a shared scale its batch-mates.
#   `Annotated[float, Field(allow_inf_nan=False)]` refuses it.
# Seen: [NaN] nan, ["nan"] nan, [1e999] inf, ["Infinity"] inf, [true] 1.0; plain 500, annotated 200 [null,null]
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile 'fastapi==0.165.0' 'pydantic==2.14.4'

cat >"$dir/check.py" <<'PY'
import asyncio
import math
from typing import Annotated

from fastapi import FastAPI
from pydantic import Field

app = FastAPI()
got = []


@app.post("/rows")
def rows(row: list[float]) -> None:
    got.append(row[0])


@app.post("/strict")
def strict(row: list[Annotated[float, Field(allow_inf_nan=False)]]) -> None:
    got.append(row[0])


@app.post("/plain")
def plain():
    return [math.nan, math.inf]


@app.post("/annotated")
def annotated() -> list[float]:
    return [math.nan, math.inf]


async def post(path, body=b""):
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path}
    scope |= {"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers}
    try:
        await app(scope | {"client": ("client", 1), "server": ("server", 80)}, receive, send)
    except ValueError:  # starlette answers 500, then raises for the server's log
        pass
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]).decode()


for body in (b"[NaN]", b'["nan"]', b"[1e999]", b'["Infinity"]', b"[true]"):
    assert asyncio.run(post("/rows", body))[0] == 200
    print(body.decode(), "->", got[-1])
assert all(math.isnan(x) for x in got[:2]) and got[2:] == [math.inf, math.inf, 1.0]
assert asyncio.run(post("/strict", b'["nan"]'))[0] == 422
print("plain", asyncio.run(post("/plain"))[0], "annotated", asyncio.run(post("/annotated")))
assert asyncio.run(post("/plain"))[0] == 500
assert asyncio.run(post("/annotated")) == (200, "[null,null]")
PY
cd "$dir"
"$dir/venv/bin/python" -W ignore check.py
