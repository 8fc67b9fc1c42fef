"""Mutations of the judge: one constant, term or condition changed at a time, and who notices.

`python -m tests.mutations` prints the table and ends with exit code 1 if a mutation survives.
"""
