"""Which format every layer gets under a budget: numbers only."""
