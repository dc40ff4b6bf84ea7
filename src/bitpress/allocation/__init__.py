"""The choice of a format for every layer under a budget: numbers only."""
