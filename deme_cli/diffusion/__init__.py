"""The diffusion model and its mathematics: noise schedule, denoiser, channel-wise projection."""
