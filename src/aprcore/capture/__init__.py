"""Running other engines to dump what they compute."""
