"""What describes a unit: a word makes the similarities of a space's units, target by donor, that a matcher takes."""
