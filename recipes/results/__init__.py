"""Results: accuracy, calibration and figures."""
