"""Many recipes on one model, where everything but the recipe is the same."""
