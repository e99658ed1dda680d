"""Pages for growers: what their sensors measure, what their devices do, and what is wrong."""
