"""Implementation of `polyshard verify`: parity across libraries and sizes, and the certificate of exact mode."""
