"""Plans: how a model spreads over devices."""
