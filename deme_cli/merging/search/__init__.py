"""Finding the coefficients: plans that propose points, objectives, and trials kept on disk."""
