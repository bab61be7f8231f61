"""Published experiments with the local learning coefficient, by a sampler that says when it failed.

    python -m reproductions.learning_coefficient deep-linear --output results --group 5-50
    python -m reproductions.learning_coefficient digits --output results
    python -m reproductions.learning_coefficient mnist --output results --hidden 64 64

`deep_linear` compares estimates for random deep linear networks with exact values (Furman and Lau,
arXiv 2402.03698); `mnist` asks whether entropy-SGD finds solutions of a smaller coefficient than
SGD (Lau, Murfet and Wei, arXiv 2308.12108); `digits` whether checkpoints of a classifier come in
the order in which HMC has them. One JSON file for each estimate, and a table. Started again, it
skips what is finished.
"""
