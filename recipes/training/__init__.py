"""A training run: its images, objective, checkpoints, states, ranks and faults."""
