"""`aneuron serve`: models as a service of the Open Inference Protocol, over HTTP and gRPC.

Lives here: the command line, the file's text. Must not be here: what is served, and how (aneuron/serve/).
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aneuron import AneuronError

logger = logging.getLogger("aneuron.serve")

DESCRIPTION = """\
Serve models by the Open Inference Protocol (KServe v2, Triton), with probes, metrics and a console; SIGTERM drains.

    aneuron serve nets:encoder --set batch_size=8 --set 'example_inputs="1x128:int64:0-30000"'
    aneuron serve service.toml --http 8000 --grpc 8001

A model is a file, or module:attribute: a module, a function or class that makes one, or an AsyncDataParallel. A file
that ends with .toml, .yaml or .yml has [server], [pools.NAME] and [models.NAME] tables."""

_NEEDS = "aneuron serve needs {name}: pip install 'aneuron[serve]'"


def add(subparsers: Any) -> None:
    """Add the subcommand to those of `aneuron`."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve", help="serve models over HTTP and gRPC", description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", nargs="+", metavar="MODEL", help="[NAME=]PATH, [NAME=]module:attribute, or one file "
                        "of settings")  # fmt: skip
    parser.add_argument("--host", help="address to listen on (127.0.0.1; 0.0.0.0 lets others in)")
    parser.add_argument("--http", type=int, metavar="PORT", help="of HTTP (8000; 0: any that is free)")
    parser.add_argument("--grpc", type=int, metavar="PORT", help="of gRPC (none)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets",
                        help="an argument of each model named here, as batch_size=8, or of any table, as "
                        "models.NAME.dim=0 and server.drain_delay=5; values as in TOML")  # fmt: skip
    parser.add_argument("--allow-load", action="store_true", default=None, help="SIGHUP, and POST /v2/repository/"
                        "models/NAME/load, have models loaded anew")  # fmt: skip
    parser.add_argument("--max-body", type=int, metavar="BYTES", help="that a request may have (64 MiB)")
    parser.add_argument("--token-file", metavar="FILE", help="holds a token that all but probes and inference needs")
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate, PEM; with --tls-key")
    parser.add_argument("--tls-key", metavar="FILE", help="its key")
    parser.set_defaults(run=run, unknown="what a model is told is said by --set KEY=VALUE, as --set backend=cpu")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.path.insert(0, os.getcwd())  # modules are named as from here; and imported again
    with _ended_by_sigterm():
        try:
            from aneuron.serve import app, config, loading
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("aneuron"):
                raise
            print(_NEEDS.format(name=error.name), file=sys.stderr)
            return 2
        try:
            settings = config.settings_of(_tables(args, config))
            app.bind(settings.server).close()  # a port in use is in use before minutes of loading, too
            _serve(app.Service(settings.server, loading.make(settings)))
        except config.ConfigError as error:
            print(f"aneuron serve: {error}", file=sys.stderr)
            return 2
        except (asyncio.CancelledError, KeyboardInterrupt):
            logger.warning("ended by a signal, before it served")
            return 130
        except Exception as error:  # whatever loading and a model's start raise
            whose = f" ({'; '.join(error.__notes__)})" if hasattr(error, "__notes__") else ""
            known = isinstance(error, AneuronError)  # whose words suffice
            logger.error("not served: %s%s", error, whose, exc_info=None if known else error)
            return 1
    return 0


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Until the service heeds signals itself SIGTERM is as Ctrl-C; and SIGHUP, for which it is too early, nothing."""
    early: dict[int, Any] = {signal.SIGTERM: signal.default_int_handler, signal.SIGHUP: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in early.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tables(args: argparse.Namespace, config: Any) -> Any:
    """All that is asked for, before it is checked."""
    files = [each for each in args.what if each.endswith(config.SUFFIXES) and "=" not in each]
    if len(files) > 1:
        raise config.ConfigError(f"{files[0]!r} and {files[1]!r}: one file has all settings; put them into one")
    raw: Any = {}
    for path in files:
        try:
            with open(path, encoding="utf-8") as file:
                raw = config.parse(file.read(), path)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise config.ConfigError(f"{path!r} cannot be read: {why}; expected a file of settings") from None
    flags = ("host", "http", "grpc", "allow_load", "max_body", "token_file", "tls_cert", "tls_key")
    said = {key: value for key in flags if (value := getattr(args, key)) is not None}
    return config.from_command_line(raw, [each for each in args.what if each not in files], said, args.sets)


def _serve(service: Any) -> None:
    async def main() -> None:
        service.obey_signals()
        await service.run()

    try:
        import uvloop
    except ModuleNotFoundError:
        asyncio.run(main())
    else:
        uvloop.run(main())
