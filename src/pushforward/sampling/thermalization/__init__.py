"""Whether a sampler reaches the posterior: problems with a known draw, and a verdict."""
