"""The subcommands, one module each: `add_parser` declares it, `run` carries it out."""
