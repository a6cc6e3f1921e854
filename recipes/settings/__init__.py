"""Settings of a training run: their types, ranges, conflicts, and the command line that sets them."""
