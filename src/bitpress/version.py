"""The version and where the package comes from, kept where no import is needed to read them."""

__all__ = ["INSTALL", "__version__"]

__version__ = "0.1.0"
# What tells somebody without the package how to install it. It is on no package index yet.
INSTALL = "`pip install .` in a clone of its repository"
