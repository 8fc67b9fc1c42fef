"""The engine of aprtui: run a transformer stage by stage and judge every stage against a reference.

Importable and typed; it prints nothing and knows no terminal. Start at `aprcore.network.graph`,
from which everything else derives.
"""
