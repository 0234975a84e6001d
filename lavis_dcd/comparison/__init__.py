"""Several runs side by side: their folder, which of them are done, and their table."""
