"""The first command of the README, and the PostgreSQL that it starts."""
