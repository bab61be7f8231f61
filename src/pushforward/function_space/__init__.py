"""How far a network moved as a function: summaries of its data, distances, and their uses."""
