"""Episodes side by side on one engine."""
