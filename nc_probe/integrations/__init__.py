"""Neural collapse in training loops: one module for each, which imports the package that it is for.

* `nc_probe.integrations.transformers`: a callback of the Trainer of transformers.
* `nc_probe.integrations.lightning`: a callback of the Trainer of Lightning.
* `nc_probe.integrations.epochs`: a hook for a loop of one's own, or that of timm's train.py; it needs nothing.
"""
