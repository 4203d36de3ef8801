"""How fast and how fair, beside ``QueuePool`` and the least a pool can be."""
