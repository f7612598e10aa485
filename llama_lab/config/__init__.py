"""Schema, composition, validation and identity of a run. No torch here."""
