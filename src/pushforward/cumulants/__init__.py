"""Law of inputs -> law of outputs: cumulant propagation, error bars, tails, Monte Carlo."""
