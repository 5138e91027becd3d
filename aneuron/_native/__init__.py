"""Runs the core as compiled extensions, or as its Python source; decided once, before any of its modules is imported.

Extensions are used if all of them were made from the sources that lie here now. Compiled and Python modules are never
mixed: classes of different builds do not fit together. `ANEURON_PURE=1` runs the Python source. So does a free-threaded
Python: attributes of compiled classes are bare pointers, which one thread may free while another reads them.

Must not be here: how extensions are made (build.py), logging.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from aneuron._native.sources import FOLDER, FREE_THREADED, MANIFEST, digests, extension, modules


def choose(package: Path, pure: str | None) -> tuple[dict[str, str], str | None]:
    """The extensions to use, by module; and why none is used, or None. `pure` is what ANEURON_PURE says."""
    if pure not in (None, "", "0"):
        return {}, f"ANEURON_PURE={pure}"
    if FREE_THREADED:
        return {}, "this Python is free-threaded"
    folder = package / FOLDER
    try:
        built = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}, "it was not compiled for this Python"
    if "failed" in built:
        return {}, built["failed"]
    now = digests(package)
    then = built["sources"]
    if changed := sorted(path for path in {*now, *then} if now.get(path) != then.get(path)):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return {}, f"{changed[0]}{more} changed since it was compiled: install it again, or make compiled"
    extensions = {name: str(folder / extension(source)) for name, source in modules(now).items()}
    if missing := [file for file in extensions.values() if not os.path.exists(file)]:
        return {}, f"{missing[0]} is missing: install it again, or make compiled"
    return extensions, None


class _Loader(ExtensionFileLoader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        try:
            return super().create_module(spec)
        except ImportError as error:
            error.add_note("ANEURON_PURE=1 runs the Python source instead; installing aneuron again compiles it anew.")
            raise


class _Finder(MetaPathFinder):
    def __init__(self, extensions: Mapping[str, str]) -> None:
        self.extensions = extensions

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.extensions.get(name)
        return spec_from_file_location(name, file, loader=_Loader(name, file)) if file else None


_extensions, why_pure = choose(Path(__file__).parent.parent, os.environ.get("ANEURON_PURE"))
if _extensions:
    sys.meta_path.insert(0, _Finder(_extensions))

_said = False


def why_pure_once() -> str | None:
    """Why the core runs as Python, at the first call in a process; None at later ones, and where it is compiled."""
    global _said
    said, _said = _said, True
    return None if said else why_pure
