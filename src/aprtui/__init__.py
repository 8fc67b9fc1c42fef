"""The terminal of aprtui: a command line and an explorer over `aprcore`, without arithmetic."""

__version__ = "0.1.0"
