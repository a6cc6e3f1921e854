"""The embedded data set: handwritten digits, small enough to train on within minutes on a CPU."""

import datasets
import numpy as np
from PIL import Image


def digits() -> dict[str, datasets.Dataset]:
    """Scikit-learn's handwritten digits: 1797 real images of 8 x 8 pixels, 10 classes; every third image of a class
    is for testing.

    Source: Alpaydin & Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits  # takes a second to import, and other data sets do not need it

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(np.asarray(pixels).reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # stored as 0..16
    labels = np.asarray(labels)
    rank_in_class = np.zeros(len(labels), dtype=int)
    for k in range(10):
        rank_in_class[labels == k] = np.arange((labels == k).sum())
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=[str(k) for k in range(10)]))
    splits = {}
    for name, rows in (("train", rank_in_class % 3 != 2), ("test", rank_in_class % 3 == 2)):
        content = {"image": [Image.fromarray(x) for x in pixels[rows]], "label": labels[rows].tolist()}
        splits[name] = datasets.Dataset.from_dict(content, features=features)
    return splits
