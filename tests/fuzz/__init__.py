"""Fuzzing of every reader of files: structure-aware, seeded, in process; docs/reliability.md."""
