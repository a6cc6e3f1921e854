"""How a model is read: its classifier, its layers, and the iterates of its solver."""
