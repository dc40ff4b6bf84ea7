"""Terms: the summands of a compressed weight."""
