"""What a row may look like: one form a file. Which one a file has is seen by the keys of its first row (finebits.data.rows)."""
