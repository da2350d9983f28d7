"""What people look at: tables and bars for a terminal, and one self-contained page for a plan or a run."""
