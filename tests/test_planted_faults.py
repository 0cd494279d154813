"""The planted faults still name text and tests that are there.

Running them takes long (``python tests/planted_faults.py``); that none has lost its
anchor is checked with every run of the suite.
"""

import re

import pytest
from cases import CASES
from planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("name", FAULTS)
def test_the_text_to_break_stands_once(name):
    fault = FAULTS[name]
    assert (ROOT / fault.path).read_text().count(fault.old) == 1
    assert fault.new != fault.old


@pytest.mark.parametrize("name", FAULTS)
def test_the_tests_to_fall_are_there(name):
    path, _, chosen = FAULTS[name].tests.partition(" -k ")
    text = (ROOT / path).read_text()
    found = [*re.findall(r"^def (test_\w+)", text, re.MULTILINE), *CASES]
    words = set(re.findall(r"\w+", chosen)) - {"and", "or", "not"}
    assert any(word in test for word in words for test in found) or not words
