"""What a run says at its end."""

from pathlib import Path

from recipes.training.outcome import summary


def test_numbers_that_there_are_not_are_dashes():
    results = {
        "test": {"overall": 0.12345, "majority": 1.0, "minority": None},
        "collapse": {"nc1": None, "nc2_etf": 0.123456, "nc3": None, "nc4": 1.0},
        "solver": None,
    }
    assert summary(results, Path("runs/x")).splitlines() == [
        "test accuracy    overall 12.35%   majority 100.00%   minority -",
        "neural collapse  NC1 -   NC2 0.1235   NC3 -   NC4 1",
        "evaluations      -",
        "run folder       runs/x",
    ]
    results["solver"] = {"mean_steps": 12.25, "converged": 0.987}
    assert summary(results, Path("x")).splitlines()[2] == "evaluations      12.25 per image, 98.7% converged"
