"""The terminal of aprtui: a command line and an explorer over `aprcore`. No arithmetic lives here."""

__version__ = "0.1.0"
