"""URLs of the rules part of the REST API, under /api/v1/."""

from __future__ import annotations

from django.urls import path
from rest_framework.routers import SimpleRouter

from rules.api import alarm_views, rejected_views, telemetry, views

router = SimpleRouter(trailing_slash=False, use_regex_path=False)
router.register("rule-chains", views.RuleChainViewSet)
router.register("rule-chains/<uuid:chain_uuid>/nodes", views.RuleNodeViewSet)
router.register("alarms", alarm_views.AlarmViewSet)
router.register("rejected-events", rejected_views.RejectedEventViewSet)
router.register("dead-letters", rejected_views.DeadLetterViewSet)
router.register("replays", rejected_views.ReplayViewSet)

urlpatterns = [
    path("telemetry", telemetry.view, name="telemetry"),
    path(
        "device-state-instances", views.StateInstanceViewSet.as_view({"post": "create"}), name="device-state-instances"
    ),
    *router.urls,
]
