"""The layers and functions that a model is written with."""
