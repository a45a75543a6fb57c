"""The trial: a small model of the same configuration, compared with transformers' own before memory is taken."""
