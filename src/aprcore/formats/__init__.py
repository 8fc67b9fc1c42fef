"""Readers of model files, and writers of the formats that this project writes."""
