"""Does a vision transformer keep looking locally while it learns class after class, and does it pay?"""

__version__ = "0.1.0"
__all__ = ["LocalityLog", "Probe"]


def __getattr__(name: str) -> object:
    """Probe and LocalityLog, loaded when asked for: `locality-probe --help` must not wait for torch."""
    if name in __all__:
        from locality_probe import log, probe

        return getattr(probe if name == "Probe" else log, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
