"""Areas: the places of a farm, such as a site, a greenhouse and a bench, in which sensors and devices stand."""
