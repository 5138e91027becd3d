"""Who may do what, and the certificates.

Lives here: the token, which requests need it, over HTTP and gRPC; TLS. Must not be here: routes, servers.
"""

import base64
import binascii
import hmac
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

from aneuron.serve.config import ConfigError, ServerSettings
from aneuron.web.v2.errors import Refused
from aneuron.web.v2.http import find

CHALLENGE = 'Bearer realm="aneuron", Basic realm="aneuron"'
# What clients of the models need; all else tells how busy the service is, or changes it.
_OPEN = {"server", "live", "server ready", "metadata", "ready", "infer"}
_OPEN_METHODS = {
    "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer", "ModelStreamInfer",
}  # fmt: skip


class Token:
    """The token that is asked for where no inference is; a browser may give it as the password of any user."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def is_in(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header has it.

        >>> Token("secret").is_in("Bearer secret"), Token("secret").is_in("Bearer Secret"), Token("secret").is_in(None)
        (True, False, False)
        """
        scheme, _, given = (authorization or "").partition(" ")
        said = given.strip().encode(errors="surrogateescape")
        if scheme.lower() == "basic":
            try:
                said = base64.b64decode(said, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(said, self._token)


def of_protocol(path: str) -> bool:
    """Whether it is the Open Inference Protocol's."""
    return path.startswith("/v2/") or path == "/v2"


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no token: probes, and what a client of the models asks. `path` as the handler sees it.

    >>> [is_open("GET", path) for path in ("/readyz", "/v2/models/net/ready", "/v2/models/net/config", "/metrics")]
    [True, True, False, False]
    """
    if path in ("/livez", "/readyz"):
        return True
    try:
        return of_protocol(path) and find(method, path).what in _OPEN
    except Refused:
        return False


def token_of(server: ServerSettings) -> Token | None:
    """The token in the file that was named, if one was."""
    if server.token_file is None:
        return None
    token = _read("token_file", server.token_file).decode(errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"server.token_file = {server.token_file!r}: expected one line of printable ASCII characters, no space"
        )
    return Token(token)


def tls_of(server: ServerSettings) -> ssl.SSLContext | None:
    """TLS for HTTP, where a certificate was named."""
    if server.tls_cert is None or server.tls_key is None:
        return None
    for key, path in (("tls_cert", server.tls_cert), ("tls_key", server.tls_key)):
        _read(key, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key, password="")  # never asked for at a terminal
    except ssl.SSLError as error:
        raise ConfigError(
            f"server.tls_cert = {server.tls_cert!r}, server.tls_key = {server.tls_key!r}: expected a certificate in "
            f"PEM and its key without a password: {error.reason or error}"
        ) from None
    return context


def grpc_credentials(server: ServerSettings) -> Any:
    """The same for gRPC."""
    if server.tls_cert is None or server.tls_key is None:
        return None
    import grpc

    chain, key = _read("tls_cert", server.tls_cert), _read("tls_key", server.tls_key)
    return grpc.ssl_server_credentials([(key, chain)])


def grpc_guard(token: Token) -> Any:
    """An interceptor of gRPC servers that asks for the token."""
    import grpc

    async def refuse(request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "metadata 'authorization: Bearer TOKEN' is expected")

    class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # there are no types of it
        async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
            said = dict(details.invocation_metadata or ()).get("authorization")
            if details.method.rpartition("/")[2] in _OPEN_METHODS or token.is_in(said):
                return await continuation(details)
            return grpc.unary_unary_rpc_method_handler(refuse)

    return Guard()


def _read(key: str, path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(f"server.{key} = {path!r}: it cannot be read: {error.strerror}") from None
