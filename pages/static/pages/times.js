// Times as the person who looks would write them: the server knows none but UTC.
"use strict";

function localTimes(place) {
  for (const each of place.querySelectorAll("time[datetime]")) {
    const at = new Date(each.dateTime);
    each.title = each.dateTime;
    each.textContent = new Intl.DateTimeFormat(undefined, { weekday: "short", day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" }).format(at);
  }
}

localTimes(document);
