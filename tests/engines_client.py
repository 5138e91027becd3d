"""A program that uses engines, in a process of its own: `engines_client.py NAME`, or "" for engines of its own.

It says what it has on its output, a line for each line that it is told.
"""

import asyncio
import json
import sys

import torch

from aneuron import CpuBackend
from aneuron.remote.shared import Shared
from aneuron.remote.sources import Source
from aneuron.remote.supervision import Plan
from aneuron.remote.supervisor import Processes, Supervisor

STAND_IN = "stand_in:StandIn"


class Net(torch.nn.Module):
    """Defined in the program itself."""

    def forward(self, x):
        return 2 * x


def asked(sock, *what):
    with sock, sock.makefile("rw") as file:
        file.write(json.dumps(what) + "\n")
        file.flush()
        return json.loads(file.readline())


async def main(name):
    plan = Plan.of(CpuBackend(cores=2), [0, 1], 2, None)
    supervision = Shared(name, plan, 0.1, STAND_IN) if name else Supervisor(plan, Processes(STAND_IN))
    await supervision.start()
    await supervision.load(0, await asyncio.to_thread(Source.of, Net(), fingerprint=True), {"split_size": 4})
    print(json.dumps([engine.pid for engine in supervision.engines]), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        if line.strip() == "ready":
            while not all(engine.state == "ready" for engine in supervision.engines):
                await asyncio.sleep(0.01)
            print(json.dumps([engine.pid for engine in supervision.engines]), flush=True)
        else:
            link = await supervision.connect(int(line))
            print(json.dumps(await asyncio.to_thread(asked, link, "run", 0, [1.0, 2.0])), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))  # and out, without closing anything
