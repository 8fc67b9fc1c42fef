"""What a run found, as plain records, and the words for it."""
