"""Weights of others in, weights for others out: every table, file format and text file that knows their names."""
