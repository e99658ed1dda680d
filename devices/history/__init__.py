"""History: readings rolled up by hour and day, charts and exports of any span, and how long it is kept."""
