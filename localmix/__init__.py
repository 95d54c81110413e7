"""localmix: the best quantized model that a laptop can run, with the numbers that prove it."""

__version__ = "0.1.0"
