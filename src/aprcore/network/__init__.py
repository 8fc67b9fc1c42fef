"""What a transformer is: its graph of stages, its configuration, its weights by name."""
