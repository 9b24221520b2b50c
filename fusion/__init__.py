"""Networks that were trained apart become one network: recipes in, checkpoints and a report out."""

__version__ = "0.1.0"
