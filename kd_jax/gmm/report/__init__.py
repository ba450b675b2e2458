"""Pages of mixture runs."""
