"""Pages about people: who belongs to a farm with which role, and what one prefers to see."""
