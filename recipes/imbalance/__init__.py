"""Class imbalance: profiles of class sizes, and what makes up for them (samplers, priors, losses, classifiers)."""
