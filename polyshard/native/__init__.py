"""C++ that the machine's own compiler builds at its first use: loops for which torch has no fast operator on CPU."""
