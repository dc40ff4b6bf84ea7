"""Terms: what a compressed weight is a sum of."""
