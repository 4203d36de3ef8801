"""What the scenarios measure with: load, pools, databases, and rounds in turn."""
