"""It is there: this version knows penalties."""
