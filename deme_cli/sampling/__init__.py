"""Drawing images from one denoiser or an ensemble of experts."""
