"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import aneuron

MODULES = ["aneuron", *(module.name for module in pkgutil.walk_packages(aneuron.__path__, "aneuron."))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    if name == "aneuron.ray.serving":
        pytest.importorskip("ray", reason="Ray is an environment of its own: make ray")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    names = [name for name in MODULES if name != "aneuron.ray.serving"]
    found = [test for name in names for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 4
