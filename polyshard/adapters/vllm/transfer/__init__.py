"""Weight transfer from a trainer of any library and size into running vLLM engines, verified by fingerprints."""
