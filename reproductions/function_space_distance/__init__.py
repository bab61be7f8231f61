"""How far did the function move? Every estimator beside the true distance, on trained networks.

    python -m reproductions.function_space_distance nets --network digits --output results
    python -m reproductions.function_space_distance nets --network mnist --output results
    python -m reproductions.function_space_distance compression --output results

`nets` moves perceptrons in 24 ways (random noise, training on permuted pixels, training on shifted
labels) and compares estimates and their gradients with those over all data (Dhawan, Huang, Bae and
Grosse, arXiv 2302.03519). `compression` prunes and quantises a convolutional network. One JSON file
for each network, and tables. Started again, it skips the methods that are finished.
"""
