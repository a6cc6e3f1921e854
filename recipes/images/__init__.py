"""Image data sets: where they come from, and how their pixels reach the model."""
