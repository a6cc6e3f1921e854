"""The layer-peeled theory of imbalanced classes, for explicit networks and for a linear DEQ."""
