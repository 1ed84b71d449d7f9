"""Model families, one folder each, and the protocol by which they describe themselves."""
