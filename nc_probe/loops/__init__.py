"""Evaluation loops: a model is shown a loader, and measured."""
