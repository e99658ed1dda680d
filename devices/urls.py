"""URLs of the devices part of the REST API, under /api/v1/."""

from __future__ import annotations

from typing import Any

from django.urls import path
from rest_framework.routers import SimpleRouter

from devices import views
from devices.areas import api as areas
from devices.audit import api as audit
from devices.interlocks import api as interlocks
from devices.people import api as people
from devices.people import login

router = SimpleRouter(trailing_slash=False, use_regex_path=False)
router.register("organizations", views.OrganizationViewSet)
router.register("invitations", people.InvitationViewSet)
router.register("api-tokens", people.ApiTokenViewSet)
router.register("areas", areas.AreaViewSet)
router.register("sensors", views.SensorViewSet)
router.register("variables", views.VariableViewSet)
router.register("devices", views.DeviceViewSet)
router.register("device-states", views.DeviceStateViewSet)
router.register("interlocks", interlocks.InterlockViewSet)
router.register("interlock-requirements", interlocks.RequirementViewSet)
router.register("vetoes", interlocks.VetoViewSet)
router.register("device-tokens", views.DeviceTokenViewSet)
router.register("readings", views.ReadingViewSet)
router.register("data-problems", views.DataProblemViewSet)
router.register("state-changes", views.StateChangeViewSet)
router.register("audit-log", audit.AuditViewSet)

Actions = dict[str, Any]
MEMBERSHIPS: Actions = {"get": "list", "post": "create"}
MEMBERSHIP: Actions = {"get": "retrieve", "put": "update", "patch": "partial_update", "delete": "destroy"}

urlpatterns = [
    path("auth/login", login.LoginView.as_view(), name="login"),
    path("auth/refresh", login.RefreshView.as_view(), name="refresh"),
    path("auth/logout", login.LogoutView.as_view(), name="logout"),
    path("invitations/accept", people.JoinView.as_view(), name="join"),
    path("memberships", views.MembershipViewSet.as_view(MEMBERSHIPS), name="membership-list"),
    path(
        "memberships/<uuid:uuid>/<str:username>", views.MembershipViewSet.as_view(MEMBERSHIP), name="membership-detail"
    ),
    *router.urls,
]
