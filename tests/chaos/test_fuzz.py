"""A short run of fuzz.py, where atheris is installed."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_what_parses_bytes_or_strings_gives_an_answer_or_its_own_error(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    script = Path(__file__).with_name("fuzz.py")
    command = [sys.executable, str(script), "-runs=20000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120.0)
    assert done.returncode == 0, done.stderr[-3000:]
