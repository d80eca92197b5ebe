"""How far experts moved, and where they pull apart (the paper's figure 6b)."""
