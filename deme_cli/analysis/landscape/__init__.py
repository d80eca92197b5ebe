"""The loss around a model, over a plane or along a line (the paper's figures 4 and 6a)."""
