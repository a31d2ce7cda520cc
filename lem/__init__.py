"""lem: energy, throughput and latency of LLM inference, measured in campaigns."""

__all__ = ["__version__"]

__version__ = "0.1.0"
