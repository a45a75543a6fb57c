"""One kernel per file. Each says what it cannot do, and computes packed attention forward and backward."""
