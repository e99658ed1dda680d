"""The page of those who run the system: circuit, queue, refusals, workers, and the buttons for them."""
