"""Stage tensors on disk: directories of stage files, and other engines' dumps in one file."""
