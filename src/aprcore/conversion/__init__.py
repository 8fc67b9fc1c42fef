"""Writing .apr files from other models, with quantisation."""
