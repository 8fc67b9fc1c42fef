"""Quantised types: their values, their steps, and how they are made."""
