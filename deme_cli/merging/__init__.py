"""Task vectors, their merge into one network, and the search for its coefficients."""
