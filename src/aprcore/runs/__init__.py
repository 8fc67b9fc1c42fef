"""One run: two sides, judged stage by stage."""
