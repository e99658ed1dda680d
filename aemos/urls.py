"""Every URL of the web process."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django_otp.plugins.otp_static.models import StaticDevice
from django_otp.plugins.otp_totp.models import TOTPDevice
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken

from devices.people.pages import join_page, second_factor_page
from gateway.views import GatewayView

# Nothing that a person could use, and nobody else's secrets: /account/second-factor is everybody's own.
admin.site.unregister([BlacklistedToken, OutstandingToken, StaticDevice, TOTPDevice])

# A page for everybody, whatever token comes along; it has no form of answer but HTML, OPTIONS and refusals of tokens included.
documentation = SpectacularSwaggerSplitView.as_view(
    url_name="schema", authentication_classes=[], http_method_names=["get", "head"]
)

urlpatterns = [
    path("", include("pages.urls")),
    path("admin/", admin.site.urls),
    path("account/second-factor", second_factor_page, name="second-factor"),
    path("join/<str:token>", join_page, name="join-page"),
    path("api/v1/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/v1/docs", documentation, name="docs"),
    path("api/v1/gateway", GatewayView.as_view(), name="gateway"),
    path("api/v1/", include("monitoring.urls")),
    path("api/v1/", include("devices.urls")),
    path("api/v1/", include("rules.urls")),
    path("api/v1/", include("notifications.urls")),
]
