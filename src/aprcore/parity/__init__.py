"""Two sides of a run, held against each other: the gate, its fallback, and stage by stage."""
