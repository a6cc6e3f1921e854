"""What is computed from the sums: the measures of collapse, and the geometries they are compared with."""
