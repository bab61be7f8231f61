"""How computations are run and answered: estimates, random streams, progress."""
