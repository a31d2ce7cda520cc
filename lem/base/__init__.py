"""What every layer uses. Python 2.7 must be able to read this file, as lem/__main__.py."""

__version__ = "0.1.0"
