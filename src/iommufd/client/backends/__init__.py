"""The two backends: ``kernel`` (the real files) and ``software`` (an in-process machine)."""
