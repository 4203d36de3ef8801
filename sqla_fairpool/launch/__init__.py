"""What the launcher puts in front of ``PYTHONPATH``; see ``sitecustomize.py``."""
