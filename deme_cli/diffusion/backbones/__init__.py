"""The networks that deme takes, one file each. `known.py` tells them apart by their config."""
