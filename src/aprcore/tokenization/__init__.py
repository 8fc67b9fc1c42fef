"""Text to token ids and back, from the vocabularies that models carry."""
