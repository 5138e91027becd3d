"""aneuron by the Open Inference Protocol over gRPC."""

import asyncio
import gc

import uvloop

from aneuron.web.v2.grpc import GrpcServer
from benchmarks import servers


async def main() -> None:
    async with servers.product() as net, GrpcServer(net=net) as server:
        gc.collect()
        gc.freeze()
        await server.listen(f"127.0.0.1:{servers.PORT}")
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
