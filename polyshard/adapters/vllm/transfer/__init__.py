"""Live weights: from a trainer of any library and size into running vLLM engines, proved on arrival."""
