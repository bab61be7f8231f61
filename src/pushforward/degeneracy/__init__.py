"""How degenerate a minimum is: estimates of the local learning coefficient, known values."""
