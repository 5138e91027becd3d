"""Another build of aneuron beside this one, in one process: `python -m benchmarks --against CHECKOUT`.

Lives here: loading it under a name of its own, compiled if this one is. Must not be here: timing, judgement.
"""

import hashlib
import importlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

CHECKOUT = "BENCHMARK_AGAINST"  # the environment variable that says where it is, to processes of the benchmark too
NAME = "aneuron_before"
BUILDS = Path(__file__).parents[1] / "build" / "before"


@cache
def package() -> ModuleType | None:
    """The other build, if one was asked for."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        return None
    folder = renamed(Path(checkout) / "aneuron")
    build = folder / NAME / "_native" / "build.py"
    if build.exists() and os.environ.get("ANEURON_PURE", "0") in ("", "0"):
        subprocess.run([sys.executable, str(build)], check=True, stdout=sys.stderr)  # a minute or two, the first time
    sys.path.insert(0, str(folder))
    return importlib.import_module(NAME)


def renamed(source: Path) -> Path:
    """The folder with a copy of the package under the other name, the same one for the same sources."""
    files = {
        file.relative_to(source): file.read_text()
        for file in sorted(source.rglob("*"))
        if file.suffix in (".py", ".pyx", ".pxd")
    }
    digest = hashlib.sha256(repr((str(source), files)).encode()).hexdigest()[:16]
    folder = BUILDS / digest
    for path, text in files.items():
        text = re.sub(r"^(\s*(?:from|import|cimport) )aneuron\b", rf"\1{NAME}", text, flags=re.MULTILINE)
        if path.parts[0] == "_native":
            text = text.replace('"aneuron."', f'"{NAME}."').replace('"name": "aneuron"', f'"name": "{NAME}"')
        copy = folder / NAME / path
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    return folder


def why_pure(package: ModuleType) -> str | None:
    """Why a build runs as Python; None where it is compiled."""
    native = sys.modules.get(f"{package.__name__}._native")
    return native.why_pure if native is not None else "it has no compiled core"
