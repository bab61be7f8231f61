"""How the library sees a network and its data: a graph of known layers, a stream of batches."""
