"""A pytest plugin that shows our models to timm's own test suite: `pytest -p timm_plugin test_models.py -k deq_`."""

import timm.models._registry as registry

import timm_deq

# The suite asks for the models of the modules that it lists by name, such as "resnet", for its tests of intermediate
# features and pruning: without this, ours would be skipped in silence.
for module in [m for m in registry._module_to_models if m.startswith("deq_")]:
    registry._module_to_models["resnet"].update(registry._module_to_models[module])

assert timm_deq  # imported for its registrations
