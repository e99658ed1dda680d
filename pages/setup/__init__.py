"""Pages on which a farm begins: the farm itself, its first sensor and device, and how they connect."""
