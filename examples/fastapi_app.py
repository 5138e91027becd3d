"""A complete FastAPI service: a picture goes in, the colours that it is made of come out.

    python examples/fastapi_app.py --port 8000
    curl --data-binary @picture.png localhost:8000/colours

`/colours` takes a file and decodes it in a thread. The others take pixels, in three ways that cost more and more: raw
bytes (`/raw`), MessagePack (`/msgpack`), and JSON that pydantic checks number by number (`/json`).

Besides: /docs, /console/, /metrics/, /livez, /readyz.
"""

import argparse
import asyncio
import io
import warnings
from typing import Annotated, Any

import msgspec
import torch
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from PIL import Image
from prometheus_client import CollectorRegistry, make_asgi_app
from pydantic import BaseModel, Field
from torch import Tensor, nn

from aneuron import AsyncDataParallel, CpuBackend, ShapeError
from aneuron.web import console, metrics
from aneuron.web.starlette import cancel_on_disconnect, get, install, lifespan
from aneuron.web.views import RequestView

SIZE = 32  # pixels, each way, of what the model was compiled for
SHAPE = (3, SIZE, SIZE)
COLOURS = {
    "black": 0x000000, "grey": 0x808080, "white": 0xFFFFFF, "red": 0xE02020, "orange": 0xF08020, "yellow": 0xF0E020,
    "green": 0x20A030, "blue": 0x2040D0, "purple": 0x8030B0, "pink": 0xF090B0, "brown": 0x704020,
}  # fmt: skip


class Colours(nn.Module):
    """Pictures of bytes, [n, 3, 32, 32], to the share of each colour, [n, 11]: of the pixels that are nearest to it."""

    def __init__(self) -> None:
        super().__init__()
        rgb = [[value >> 16, value >> 8 & 255, value & 255] for value in COLOURS.values()]
        self.register_buffer("palette", torch.tensor(rgb, dtype=torch.float32))

    def forward(self, pixels: Tensor) -> Tensor:
        """Numbers of four bytes are made here, on the core: a quarter of the bytes has to travel."""
        points = pixels.flatten(2).transpose(1, 2).float()
        nearest = torch.cdist(points, self.palette.expand(len(pixels), -1, -1)).argmin(2)
        return nn.functional.one_hot(nearest, len(self.palette)).float().mean(1)


model = AsyncDataParallel(  # nothing is loaded yet: the lifespan does that, in each worker process
    Colours().eval(),
    batch_size=8,
    backend=CpuBackend(),
    example_inputs=torch.zeros(1, *SHAPE, dtype=torch.uint8),
    max_pending=256,  # beyond that, callers are told at once to come again later
)
Net = Annotated[RequestView, Depends(get("colours"))]  # a test says app.dependency_overrides[get("colours")] = ...

app = FastAPI(title="Colours", lifespan=lifespan(colours=model))
install(app, server_timing=True, max_timeout=10.0, max_body=8 * 2**20, colours=model)
app.mount("/console", console.app(colours=model))
registry = CollectorRegistry()
registry.register(metrics.Collector(colours=model))
app.mount("/metrics", make_asgi_app(registry))


class Share(BaseModel):
    """A colour, and which part of the picture is nearest to it."""

    colour: str
    share: float


class Pixels(BaseModel):
    """A picture of 32 by 32 pixels: red, green and blue, row by row."""

    pixels: list[list[list[Annotated[int, Field(ge=0, le=255)]]]]


class Packed(msgspec.Struct):
    """The same as MessagePack; the bytes stay bytes."""

    pixels: bytes


def shares(row: Tensor) -> list[Share]:
    """The largest first, without those that do not appear."""
    found = [Share(colour=name, share=share) for name, share in zip(COLOURS, row.tolist(), strict=True) if share]
    return sorted(found, key=lambda one: -one.share)


def decoded(file: bytes) -> Tensor:
    """A picture of any size, as the model wants it. It takes milliseconds, so not on the event loop."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP", "GIF")) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if image.width * image.height > 2**24:
                raise HTTPException(413, f"{image.width} x {image.height} pixels; at most {2**24:,} are taken")
            data = image.convert("RGB").resize((SIZE, SIZE)).tobytes()
    except HTTPException:
        raise
    except Exception as error:  # Pillow's decoders raise anything
        raise HTTPException(415, f"not a picture that can be read: {type(error).__name__}") from None
    return of_bytes(data).view(SIZE, SIZE, 3).permute(2, 0, 1).contiguous()


def of_bytes(data: bytes) -> Tensor:
    """The bytes as a tensor: no number is looked at."""
    size = SHAPE[0] * SIZE * SIZE
    if len(data) != size:
        raise ShapeError(
            f"{len(data)} bytes; {size} are wanted, one for each of {SHAPE}"
        )  # 422, by the table of errors
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


BYTES = {"type": "string", "format": "binary"}
PACKED = {"type": "object", "properties": {"pixels": BYTES}, "required": ["pixels"]}


def body(*media_types: str, schema: dict[str, Any] = BYTES) -> dict[str, Any]:
    """What the documentation says of a body that the handler reads itself."""
    return {"requestBody": {"required": True, "content": {one: {"schema": schema} for one in media_types}}}


@app.post("/colours", openapi_extra=body("image/png", "image/jpeg", "image/webp", "image/gif"))
async def colours(request: Request, net: Net) -> list[Share]:
    """Which colours a picture has: a file in the body."""
    pixels = await asyncio.to_thread(decoded, await request.body())
    y = await cancel_on_disconnect(request, net(pixels.unsqueeze(0)))  # who leaves costs nothing any more
    return shares(y[0])


@app.post("/raw", openapi_extra=body("application/octet-stream"), response_class=Response)
async def raw(request: Request, net: Net) -> Response:
    """3 x 32 x 32 bytes in, one float32 for each colour out: the cheapest way."""
    y = await net(of_bytes(await request.body()).view(1, *SHAPE))
    return Response(y.numpy().tobytes(), media_type="application/octet-stream")


@app.post("/msgpack", openapi_extra=body("application/msgpack", schema=PACKED), response_class=Response)
async def msgpack(request: Request, net: Net) -> Response:
    """`{"pixels": bytes}` in, the colours by name out."""
    try:
        packed = msgspec.msgpack.decode(await request.body(), type=Packed)
    except msgspec.DecodeError as error:
        raise HTTPException(422, str(error)) from None
    y = await net(of_bytes(packed.pixels).view(1, *SHAPE))
    answer = dict(zip(COLOURS, y[0].tolist(), strict=True))
    return Response(msgspec.msgpack.encode(answer), media_type="application/msgpack")


@app.post("/json")
async def json(picture: Pixels, net: Net) -> list[Share]:
    """The comfortable way, where requests are few or tensors small: each number is parsed and checked."""
    try:
        pixels = torch.tensor(picture.pixels, dtype=torch.uint8)
    except ValueError as error:  # rows of unequal lengths
        raise HTTPException(422, str(error)) from None
    return shares((await net(pixels.unsqueeze(0)))[0])  # of another shape: ShapeError, which becomes a 422


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Say which colours a picture has.")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    uvicorn.run(app, port=options.port, loop="auto", timeout_graceful_shutdown=30)
