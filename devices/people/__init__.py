"""People: how they prove who they are, and what they are let into."""
