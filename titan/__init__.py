"""titan: train one large teacher and several students at the same time, on whatever accelerators there are."""

__version__ = "0.1.0"
