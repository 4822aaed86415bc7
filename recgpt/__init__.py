"""RecGPT: a GPT over item ids, its large item table, and autoregressive recall."""

__version__ = "0.1.0"
