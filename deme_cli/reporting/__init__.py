"""A run folder as one page: what lies in it, told in tables, curves and pictures."""
