"""What was found, and how it is shown: in the terminal, on a page, as JSON."""
