"""The operations page, its newest part for those who watch, and the buttons of the circuit."""

from __future__ import annotations

from datetime import timedelta

from django.contrib import messages
from django.core.exceptions import PermissionDenied
from django.db import Error as DatabaseError
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.utils import timezone
from django.views.decorators.http import require_POST, require_safe
from redis.exceptions import RedisError

from aemos.lib import redis
from devices.exceptions import Overloaded
from devices.permissions import access_of
from pages.operations import seen
from pages.place import page
from rules.admission import circuit_store, control
from rules.admission.circuit_store import Hold
from rules.journal import pauses

HOURS = (1, 2, 8, 24)
MAXIMUM_NOTE = 200


@page
@require_safe
def operations_page(request: HttpRequest) -> HttpResponse:
    """For staff: what it shows is about all organizations."""
    _demand_staff(request)
    access = access_of(request)
    shown = seen.see()
    context = {
        "shown": shown,
        "page": "operations",
        "hours": HOURS,
        "decidable": {
            row.pk for row in shown.newest_letters if access.may("change", "dead-letters", row.organization_id)
        },
    }
    return render(request, "pages/operations/operations.html", context)


@page
@require_POST
def set_circuit(request: HttpRequest) -> HttpResponse:
    """`action` is reset, or hold with `hours` and a `note`."""
    _demand_staff(request)
    by, depth = request.user.get_username(), _depth()
    try:
        if request.POST.get("action") == "hold":
            hours = request.POST.get("hours", "")
            if hours not in map(str, HOURS):
                messages.error(request, "Choose for how long the circuit is to stay open.")
                return redirect("operations-page")
            until = timezone.now() + timedelta(hours=int(hours))
            circuit_store.hold_open(Hold(by=by, until=until, note=_note(request)), queue_depth=depth)
            messages.success(
                request,
                f"The circuit stays open for {hours} h, or until it is closed here: only urgent events are accepted.",
            )
        else:
            circuit_store.reset(by, depth)
            messages.success(request, "The circuit is closed. A queue that is too long opens it again.")
    except DatabaseError:
        messages.error(request, "The database does not answer: nothing was changed.")
    return redirect("operations-page")  # fmt: skip


@page
@require_POST
def set_lane(request: HttpRequest) -> HttpResponse:
    """`action` is resume, or pause with `hours` and a `note`."""
    _demand_staff(request)
    lane, hours = request.POST.get("lane", ""), request.POST.get("hours", "")
    try:
        if request.POST.get("action") == "resume":
            pauses.resume(lane)
            messages.success(request, f"The {lane} lane goes on.")
        elif hours not in map(str, HOURS):
            messages.error(request, "Choose for how long the lane is to be paused.")
        else:
            pauses.pause(lane, by=request.user.get_username(), seconds=int(hours) * 3_600, note=_note(request))
            messages.success(request, f"The {lane} lane is paused for {hours} h: its events wait.")
    except ValueError as error:
        messages.error(request, f"Nothing was changed: {error}.")
    except RedisError as error:
        messages.error(request, f"Nothing was changed: {redis.explain(error)}.")
    return redirect("operations-page")


def _note(request: HttpRequest) -> str:
    return request.POST.get("note", "").replace("\x00", "")[:MAXIMUM_NOTE]


def _demand_staff(request: HttpRequest) -> None:
    if not request.user.is_staff:
        raise PermissionDenied("This page is for staff: it is about all organizations.")


def _depth() -> int | None:
    try:
        return control.shared().snapshot().depth
    except Overloaded:
        return None
