"""Movement of parameters between shards, buffers and files, and their fingerprints."""
