"""Models out to the formats of others, and in from them."""
