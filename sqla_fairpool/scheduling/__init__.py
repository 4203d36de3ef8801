"""Who gets the next slot, and how many each tag may hold.

Pure: nothing here knows threads, clocks, connections or SQLAlchemy.
"""
