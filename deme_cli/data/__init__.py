"""Images for training and reference: sources, and the embedded digits."""
