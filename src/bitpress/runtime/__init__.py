"""The runtime: models that run on compressed weights."""

__all__ = ["load"]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import; it is imported only when a model is loaded.
    if name == "load":
        from bitpress.runtime.opening import load

        return load
    raise AttributeError(name)
