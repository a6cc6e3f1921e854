"""How reports are written and drawn: as text, as JSON, and in figures."""
