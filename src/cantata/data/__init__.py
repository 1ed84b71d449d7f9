"""Sources, packing, collation and the loader whose order is a function of (seed, position)."""
