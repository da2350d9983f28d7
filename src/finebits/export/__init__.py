"""What a tuned model becomes for everyone else: one target a file."""
