"""The examples in docstrings do what they say."""

import doctest
import importlib
import pkgutil

import pytest

import aneuron

MODULES = ["aneuron", *(module.name for module in pkgutil.walk_packages(aneuron.__path__, "aneuron."))]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) >= 4
