"""The README's first command, and the PostgreSQL that it starts."""
