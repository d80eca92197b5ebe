"""Which timesteps pull a network the same way (the paper's figure 1)."""
