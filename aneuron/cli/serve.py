"""`aneuron serve`: models as a service of the Open Inference Protocol, over HTTP and gRPC.

Lives here: the command line, the file's text. Must not be here: what is served, and how (aneuron/serve/).
"""

import argparse
import asyncio
import logging
import os
import sys
from typing import Any

DESCRIPTION = """\
Serve models by the Open Inference Protocol (KServe v2, Triton), with probes, metrics and a console; SIGTERM drains.

    aneuron serve nets:encoder reranker=rerank.pt2 --set batch_size=8 --set 'example_inputs="1x128:int64"'
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    try:
        from aneuron.serve import app, config, loading
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("aneuron"):
            raise
        print(_NEEDS.format(name=error.name), file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    sys.path.insert(0, os.getcwd())  # modules are named as from here; and imported again
    try:
        settings = config.settings_of(_tables(args))
        made = loading.make(settings)
        return _run(app.Service, settings.server, made)
    except config.ConfigError as error:
        print(f"aneuron serve: {error}", file=sys.stderr)
        return 2


def _tables(args: argparse.Namespace) -> Any:
    """All that is asked for, before it is checked."""
    from aneuron.serve.config import SUFFIXES, ConfigError, from_command_line, parse

    files = [each for each in args.what if each.endswith(SUFFIXES) and "=" not in each]
    if len(files) > 1:
        raise ConfigError(f"{files[0]!r} and {files[1]!r}: one file has all settings; put them into one")
    raw: Any = {}
    for path in files:
        try:
            with open(path, encoding="utf-8") as file:
                raw = parse(file.read(), path)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"{path!r} cannot be read: {why}; expected a file of settings") from None
    flags = ("host", "http", "grpc", "allow_load", "max_body", "token_file", "tls_cert", "tls_key")
    said = {key: value for key in flags if (value := getattr(args, key)) is not None}
    return from_command_line(raw, [each for each in args.what if each not in files], said, args.sets)


def _run(service: Any, server: Any, made: Any) -> int:
    from aneuron.serve.config import ConfigError

    async def main() -> None:
        running = service(server, made)
        running.obey_signals()
        await running.run()

    try:
        try:
            import uvloop
        except ModuleNotFoundError:
            asyncio.run(main())
        else:
            uvloop.run(main())
    except ConfigError:
        raise
    except (asyncio.CancelledError, KeyboardInterrupt):
        logging.getLogger("aneuron.serve").warning("ended by a signal, without draining")
        return 130
    except Exception as error:
        logging.getLogger("aneuron.serve").error("not served: %s", error, exc_info=error)
        return 1
    return 0
