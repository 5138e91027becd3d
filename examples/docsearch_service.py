"""docsearch.py as a service with a search page: FastAPI around the same model and the same vectors.

    python examples/docsearch_service.py --port 8000        # then open http://localhost:8000

The vectors are computed while the service starts: it listens after that. `--limit 6000` takes all docstrings.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import torch
import uvicorn
from docsearch import Way, docstrings, load, progress
from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from torch import Tensor

from aneuron.web import console
from aneuron.web.starlette import cancel_on_disconnect, get, install, lifespan
from aneuron.web.views import RequestView

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Search Python's standard library</title>
<style>
  :root { color-scheme: light dark }
  body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem }
  input { font: inherit; width: 100%; padding: .5rem; box-sizing: border-box }
  li { margin: .6rem 0 }
  code { font-weight: 600 }
  small { opacity: .6 }
</style>
<h1>Search Python's standard library</h1>
<input id="question" placeholder="remove a directory tree" aria-label="Question" autofocus>
<p id="said" role="status"></p>
<ol id="hits"></ol>
<script>
  const [question, said, hits] = ["question", "said", "hits"].map(id => document.getElementById(id));
  let asked = new AbortController();
  question.addEventListener("input", async () => {
    asked.abort();  // the row of the last key stroke leaves the queue
    asked = new AbortController();
    const text = question.value.trim();
    if (!text) return hits.replaceChildren();
    try {
      const answer = await fetch("search?" + new URLSearchParams({q: text}), {signal: asked.signal});
      if (!answer.ok) throw new Error(`${answer.status} ${answer.statusText}`);
      hits.replaceChildren(...(await answer.json()).map(hit => {
        const line = document.createElement("li"), name = document.createElement("code");
        const score = document.createElement("small"), text = document.createElement("div");
        name.textContent = hit.name, score.textContent = " " + hit.score.toFixed(2), text.textContent = hit.text;
        line.append(name, score, text);
        return line;
      }));
      said.textContent = "";
    } catch (error) {
      if (error.name != "AbortError") said.textContent = error.message;
    }
  });
</script>
"""


class Hit(BaseModel):
    """A docstring, and how near it is to the question: 1 is the same."""

    name: str
    text: str
    score: float


def application(limit: int) -> FastAPI:
    """The service, with so many docstrings."""
    plain, tokenize = load()
    way = Way.free("any length", plain, tokenize("an example"))
    entries = docstrings()[:limit]
    found: dict[str, Tensor] = {}

    @asynccontextmanager
    async def index(app: FastAPI) -> AsyncIterator[None]:
        """Runs inside: the model is there already."""
        with progress("embedding", len(entries)) as bar:
            found["vectors"] = await way.embed(tokenize, [f"{name}: {text}" for name, text in entries], bar)
        yield

    app = FastAPI(title="docsearch", lifespan=lifespan(index, encoder=way.model))
    install(app, server_timing=True, max_timeout=5.0, encoder=way.model)
    app.mount("/console", console.app(encoder=way.model))

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    @app.get("/search")
    async def search(
        request: Request,
        encoder: Annotated[RequestView, Depends(get("encoder"))],
        q: Annotated[str, Query(min_length=1, max_length=1000)],
        hits: Annotated[int, Query(ge=1, le=50)] = 5,
    ) -> list[Hit]:
        """The docstrings nearest to a question."""
        row = await asyncio.to_thread(tokenize, q)
        vector = (await cancel_on_disconnect(request, encoder(**row)))[0]
        best = torch.topk(found["vectors"] @ vector, min(hits, len(entries)))
        return [
            Hit(name=entries[i][0], text=entries[i][1], score=score)
            for score, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Search Python's standard library by meaning, in a browser.")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--limit", type=int, default=1600, help="docstrings to embed (default: %(default)s)")
    options = parser.parse_args()
    uvicorn.run(application(options.limit), port=options.port, timeout_graceful_shutdown=30)
