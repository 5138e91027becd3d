"""A complete aiohttp service: a text goes in, the language that it is written in comes out.

    python examples/aiohttp_app.py --port 8000
    curl --data "Wem gehört dieser Hut?" localhost:8000/language

`/language` takes text. `/raw` takes the codes of many texts as raw bytes, [n, 64] of int16: the cheap way, where the
client prepares them. Besides: /console, /metrics, /livez, /readyz.
"""

import argparse
import asyncio
from collections import Counter
from zlib import crc32

import torch
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler
from torch import Tensor, nn

from aneuron import AsyncDataParallel, CpuBackend, ShapeError
from aneuron.web import console, metrics
from aneuron.web.aiohttp import get, setup

try:
    import uvloop as loops
except ImportError:
    loops = asyncio  # works as well, a little slower

CODES, LENGTH = 4096, 64  # kinds of three letters, and how many of them of a text are looked at
WORDS = {  # frequent ones: what comes between the others tells the language
    "English": "the of and a to in is you that it he was for on are as with his they at be this have from or had by "
    "hot but some what there we can out other were all your when up use how said an each she which do "
    "their time if will where who why my our these would has him her not please could about many then "
    "them so",
    "German": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden "
    "aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
    "oder aber vor zur bis mehr durch man sein wem wer wo ich du wir ihr mein dein dieser diese gehört "
    "bitte kein",
    "French": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont la "
    "mais ou avec son elle nous vous je tu cette ces aux leur même être avoir fait comme tout bien où "
    "sans peut si deux très mon ton quel quelle était été ont chez quand s'il c'est d'une l'on qu'il",
    "Spanish": "de la que el en y a los se del las un por con no una su para es al lo como más o pero sus le ha me "
    "si sin sobre este ya entre cuando todo esta ser son dos también fue había era muy años hasta desde "
    "está mi porque qué sólo han yo hay vez puede todos así nos ni parte tiene él uno donde dónde bien "
    "tiempo ella",
}  # fmt: skip


def codes(text: str) -> list[int]:
    """A number for each three letters, from 1 on."""
    letters = f" {' '.join(text.lower().split())} "
    return [crc32(letters[i : i + 3].encode()) % (CODES - 1) + 1 for i in range(len(letters) - 2)]


class Language(nn.Module):
    """Codes, [n, 64] with 0 for none, to the probability of each language, [n, 4]: naive Bayes."""

    def __init__(self) -> None:
        super().__init__()
        seen = torch.full((CODES, len(WORDS)), 0.05)
        for language, words in enumerate(WORDS.values()):
            for code, times in Counter(codes(words)).items():
                seen[code, language] += times
        weights = (seen / seen.sum(0)).log()
        weights[0] = 0.0
        self.weights = nn.Embedding.from_pretrained(weights)

    def forward(self, rows: Tensor) -> Tensor:
        """Sums of logarithms. Two bytes a code are enough on the way to the core; any two bytes are a code."""
        return self.weights(rows.long() % CODES).sum(1).softmax(1)


def encoded(text: str) -> Tensor:
    """A text as a row. Short enough for the event loop; a real tokenizer belongs into asyncio.to_thread."""
    row = torch.zeros(1, LENGTH, dtype=torch.int16)
    found = codes(text[: LENGTH + 2])[:LENGTH]
    row[0, : len(found)] = torch.tensor(found, dtype=torch.int16)
    return row


async def language(request: web.Request) -> web.Response:
    """Text in, JSON out. A client that leaves cancels this handler, and with it the call."""
    try:
        text = await request.text()
    except (UnicodeDecodeError, LookupError) as error:  # not in the charset that it says, or one that nobody knows
        raise web.HTTPUnprocessableEntity(text=str(error)) from None
    if not text.strip():
        raise web.HTTPUnprocessableEntity(text="a text is wanted in the body")
    y = await get(request, "language")(encoded(text))
    return web.json_response(dict(zip(WORDS, y[0].tolist(), strict=True)))


async def raw(request: web.Request) -> web.Response:
    """[n, 64] of int16 in, [n, 4] of float32 out: no number is looked at on the event loop."""
    data = await request.read()
    if not data or len(data) % (2 * LENGTH):
        raise ShapeError(f"{len(data)} bytes; a multiple of {2 * LENGTH} is wanted")  # becomes a 422
    y = await get(request, "language")(torch.frombuffer(bytearray(data), dtype=torch.int16).view(-1, LENGTH))
    return web.Response(body=y.numpy().tobytes(), content_type="application/octet-stream")


def application() -> web.Application:
    """The app; nothing is loaded before it starts."""
    model = AsyncDataParallel(
        Language().eval(),
        batch_size=8,
        backend=CpuBackend(),
        example_inputs=torch.zeros(1, LENGTH, dtype=torch.int16),
        max_pending=256,  # rows; beyond that, callers are told at once to come again later
    )
    app = web.Application(client_max_size=2**20)
    setup(app, server_timing=True, max_timeout=10.0, language=model)
    app.router.add_post("/language", language)
    app.router.add_post("/raw", raw)
    app.add_routes(console.routes("/console", language=model))
    registry = CollectorRegistry()
    registry.register(metrics.Collector(language=model))
    app.router.add_get("/metrics", make_aiohttp_handler(registry))
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say in which language a text is.")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    web.run_app(
        application(), host="127.0.0.1", port=options.port, loop=loops.new_event_loop(), handler_cancellation=True
    )
