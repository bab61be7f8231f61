"""Networks with Gaussian noise behind every map, and their Gibbs sampler."""
