"""Another build of aneuron beside this one, in one process: `python -m benchmarks --against CHECKOUT`.

Lives here: loading it under a name of its own. Must not be here: timing, judgement.
"""

import importlib
import os
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

CHECKOUT = "BENCHMARK_AGAINST"  # the environment variable that says where it is, to processes of the benchmark too
NAME = "aneuron_before"


@cache
def package() -> ModuleType | None:
    """The other build, if one was asked for."""
    checkout = os.environ.get(CHECKOUT)
    if not checkout:
        return None
    folder = Path(tempfile.mkdtemp(prefix="aneuron-before-"))
    source = Path(checkout) / "aneuron"
    for file in source.rglob("*.py"):
        copy = folder / NAME / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"^(\s*(?:from|import) )aneuron\b", rf"\1{NAME}", file.read_text(), flags=re.MULTILINE))
    sys.path.insert(0, str(folder))
    return importlib.import_module(NAME)
