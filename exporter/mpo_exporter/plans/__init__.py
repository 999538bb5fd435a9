"""Makes plans: from a file, by sensitivity, within a budget; and says what they are expected to give."""
