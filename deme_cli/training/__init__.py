"""How one expert is trained: what it minimises, how timesteps are drawn, how the run is kept."""
