"""Protocols and plain data. Imports the standard library and torch, and no parallelism library."""
