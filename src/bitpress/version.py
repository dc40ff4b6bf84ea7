"""The version, kept where no import is needed to read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
