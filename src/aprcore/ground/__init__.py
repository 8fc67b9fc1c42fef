"""What everything else stands on: errors, files read with bounds, threads, number types."""
