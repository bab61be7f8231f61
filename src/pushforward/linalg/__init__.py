"""Linear algebra with matrices that are only known by their products."""
