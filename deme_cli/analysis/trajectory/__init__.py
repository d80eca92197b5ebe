"""The same noise denoised by each model, step by step."""
