"""Measuring images: features, Fréchet and kernel distances, protocol cards."""
