"""How parameters move between shards, buffers and files, and how they are fingerprinted."""
