"""The report of a job, its table and its charts."""
