"""What `polyshard verify` runs: parity of libraries and sizes, and the certificate of exact mode."""
