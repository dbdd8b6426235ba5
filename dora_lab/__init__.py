"""DoRA Lab: the helper module behind the notebooks. Import what you need from its modules."""

__version__ = "0.1.0"
