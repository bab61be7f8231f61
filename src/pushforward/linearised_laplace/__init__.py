"""A trained network becomes a Gaussian posterior over its weights: predictions with error bars."""
