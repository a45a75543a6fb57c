"""What several adapters need; torch alone, no vendor."""
