"""The Open Inference Protocol as real clients speak it, over real sockets: a table of clients and what they do.

The clients run in processes of their own: the stubs of Triton's and of kserve's cannot be imported together.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tritonclient", reason="the judge of the protocol")
pytest.importorskip("grpc")
pytest.importorskip("msgspec")
from v2_clients import CLIENTS, cells

HERE = Path(__file__).parent
WHICH = [which for which in CLIENTS if which == "triton" or sys.version_info < (3, 14)]  # kserve has none for 3.14
TABLE = [(which, f"{kind.name}: {cell}") for which in WHICH for kind in CLIENTS[which] for cell in cells({})]
# What the clients refuse to do themselves; anything else must be answered.
REFUSED_BY_THE_CLIENT = {
    "triton http: BF16 in JSON", "triton http.aio: BF16 in JSON", "triton http.aio, aiohttp: BF16 in JSON",
    *(f"{client}: stream" for client in ("triton http", "triton http.aio", "triton http.aio, aiohttp")),
    *(cell for _, cell in TABLE if cell.startswith("triton grpc") and cell.endswith("in JSON")),
    *(
        f"{client}: {cell}"
        for client in ("kserve rest", "kserve grpc")
        for cell in (
            "FP16 in JSON", "BF16", "BF16 in JSON", "gzip", "deflate", "described", "load", "shared memory", "stream",
        )
    ),
    "kserve grpc: an output", "kserve grpc: outputs in another order",
}  # fmt: skip

pytestmark = pytest.mark.xdist_group("v2 clients")


def started(*command, **options):
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=HERE,
                            env=os.environ | {"PYTHONPATH": path}, **options)  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    """By cell, what became of it."""
    with started("v2_server.py", "tritonclient", stdin=subprocess.PIPE) as server:
        try:
            ports = server.stdout.readline().strip()
            assert ports, "the server has not started"
            found = {}
            for which in WHICH:
                with started("v2_clients.py", which, ports, stderr=subprocess.PIPE) as clients:
                    said, errors = clients.communicate(timeout=240)
                    assert clients.returncode == 0, errors[-3000:]
                    found |= json.loads(said.splitlines()[-1])
            yield found
        finally:
            server.stdin.close()
            assert server.wait(30) == 0


@pytest.mark.parametrize("cell", [cell for _, cell in TABLE])
def test_a_client(seen, cell):
    said = seen[cell]
    if cell in REFUSED_BY_THE_CLIENT:
        assert said.startswith("unsupported"), said
    else:
        assert said == "ok", said


AFTER = """
from aneuron.web.v2.messages import message
from kserve.protocol.grpc.grpc_predict_v2_pb2 import ModelInferRequest
data = message("ModelInferRequest")(model_name="net").SerializeToString()
assert ModelInferRequest.FromString(data).model_name == "net"
"""


@pytest.mark.skipif("kserve" not in WHICH, reason="kserve has none for 3.14")
def test_kserve_can_be_imported_after_our_messages():
    """Before, and Triton's stubs before and after, are in the processes of the table."""
    with started("-c", AFTER) as process:
        assert process.wait(120) == 0
