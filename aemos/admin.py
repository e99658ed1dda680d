"""The site of the admin: open to whoever has a role in an organization, to staff, and to superusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.contrib import admin
from django.http import HttpRequest
from django.template.response import TemplateResponse

from devices.people.admin import LoginForm, may_enter
from devices.permissions import access_of
from rules.models import Alarm, DeadLetter, RejectedEvent, Status

# What a person looks for -> the pages of it. What is not named here stands under the last one.
GROUPS: Mapping[str, Sequence[str]] = {
    "Farm": ("Organization", "Area", "Sensor", "Variable", "Reading", "DataProblem"),
    "Devices": ("Device", "DeviceState", "StateChange", "Interlock", "Veto", "DeviceToken"),
    "Rules": ("RuleChain", "Alarm", "ActionCooldown", "Notification"),
    "Events that need a person": ("RejectedEvent", "DeadLetter", "Replay"),
    "People": ("User", "Group", "Membership", "Invitation", "AuditEntry"),
    "System": ("Dashboard",),
}
_NAMES = {"Dashboard": "Queues of RQ"}


class AdminSite(admin.AdminSite):
    site_header = site_title = "AEMOS"
    index_title = "Admin"
    login_form = LoginForm
    index_template = "admin/aemos_index.html"

    def has_permission(self, request: HttpRequest) -> bool:
        return may_enter(request.user)

    def get_app_list(self, request: HttpRequest, app_label: str | None = None) -> list[dict[str, Any]]:
        """By what people look for instead of by Django app; the page of one app shows that app."""
        apps = super().get_app_list(request, app_label)
        if app_label is not None:
            return apps
        models = {model["object_name"]: model for app in apps for model in app["models"]}
        for model in models.values():
            model["name"] = _NAMES.get(model["object_name"], model["name"])
        places = {name: group for group, names in GROUPS.items() for name in names}
        last = list(GROUPS)[-1]
        found: dict[str, list[dict[str, Any]]] = {group: [] for group in GROUPS}
        ordered = [name for names in GROUPS.values() for name in names]
        for name in sorted(models, key=lambda each: ordered.index(each) if each in ordered else len(ordered)):
            found[places.get(name, last)].append(models[name])
        return [
            {
                "name": group,
                "app_label": group.lower().replace(" ", "-"),
                "app_url": "",
                "has_module_perms": True,
                "models": own,
            }
            for group, own in found.items()
            if own
        ]

    def index(self, request: HttpRequest, extra_context: dict[str, Any] | None = None) -> TemplateResponse:
        """With what waits for a person."""
        return super().index(request, {**(extra_context or {}), "waiting": _waiting(request)})


def _waiting(request: HttpRequest) -> list[tuple[str, int, str]]:
    """What it is, how many, and the name of the page."""
    access = access_of(request)
    alarms = access.limit(Alarm.objects.exclude(state=Alarm.State.CLEARED), "organization", resource="alarms")
    letters = access.limit(DeadLetter.objects.filter(status=Status.OPEN), "organization", resource="dead-letters")
    rejected = access.limit(
        RejectedEvent.objects.filter(status=Status.OPEN), "organization", resource="rejected-events"
    )
    return [
        ("open alarms", alarms.count(), "admin:rules_alarm_changelist"),
        ("dead letters", letters.count(), "admin:rules_deadletter_changelist"),
        ("rejected events", rejected[:10_001].count(), "admin:rules_rejectedevent_changelist"),
    ]
