"""The verbs of a recipe: one file each, whose function of the same name takes a `Job` and the recipe's fields."""
