"""The parts of recipes/benchmark.py, one per file."""
