"""What is learned from answers that were liked more and less: one objective a file."""
