"""The runtime: models that run on compressed weights."""

__all__ = ["load"]


def __getattr__(name: str) -> object:
    # transformers takes seconds to import; only who loads a model pays for it.
    if name == "load":
        from bitpress.runtime.opening import load

        return load
    raise AttributeError(name)
