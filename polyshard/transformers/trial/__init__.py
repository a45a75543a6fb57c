"""The trial model: a reduced model of the same configuration, compared with transformers' own."""
