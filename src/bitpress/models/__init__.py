"""Models: opened without their weights, walked block by block, and what their parameters are for."""
