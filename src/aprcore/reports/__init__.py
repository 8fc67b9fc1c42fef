"""A finished run as a file to hand on: HTML to read, Markdown for an issue, JSON for programs."""
