"""The examples in docstrings run, and give what they say."""

import doctest

import pytest

from nc_probe import probe, report
from nc_probe.moments import class_moments


@pytest.mark.parametrize("module", [class_moments, probe, report], ids=lambda module: module.__name__)
def test_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted and not found.failed
