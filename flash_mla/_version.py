"""The one place that holds the version: read by `pyproject.toml` at build time, by `flash_mla` at run time."""

__version__ = "0.1.0"
