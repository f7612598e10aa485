"""How fast configs train here."""
