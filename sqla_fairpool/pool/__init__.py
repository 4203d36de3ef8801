"""The checkout path, for threads and tasks."""
