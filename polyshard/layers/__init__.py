"""Parallel layers and the functions that models are written with."""
