"""The examples in the docstrings of the packages run as they stand."""

import doctest
import importlib
import pkgutil

import pytest

import nc_probe
import timm_deq

# Modules for training loops of others, which take seconds to import: their tests run what README has.
FOREIGN = {"nc_probe.integrations.transformers", "nc_probe.integrations.lightning"}
MODULES = sorted(
    module.name
    for package in (timm_deq, nc_probe)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if module.name not in FOREIGN
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of(name):
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


def test_what_users_meet_first_has_an_example():
    documented = [timm_deq.fixed_point, timm_deq.Equilibrium, timm_deq.Anderson]
    assert all(">>>" in (thing.__doc__ or "") for thing in documented)
