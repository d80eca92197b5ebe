"""The denoising loss of each model against the timestep."""
