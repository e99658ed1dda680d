"""Pages on which a grower makes, tries and switches rules."""
