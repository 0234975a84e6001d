"""Features and scores that are computed once and kept, in memory or on disk."""
