"""Every URL of the web process."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest, HttpResponseNotFound, JsonResponse
from django.http.response import HttpResponseBase
from django.urls import include, path
from django.views import defaults
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

admin.site.site_header = admin.site.site_title = "AEMOS"

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/v1/schema", SpectacularAPIView.as_view(), name="schema"),
    path("api/v1/docs", SpectacularSwaggerView.as_view(url_name="schema"), name="docs"),
    path("api/v1/", include("monitoring.urls")),
    path("api/v1/", include("devices.urls")),
    path("api/v1/", include("rules.urls")),
    path("api/v1/", include("notifications.urls")),
]


def handler404(request: HttpRequest, exception: Exception) -> HttpResponseBase:
    """Programs that call the API get JSON also where no view is."""
    if request.path.startswith("/api/"):
        return JsonResponse({"detail": "Not found."}, status=HttpResponseNotFound.status_code)
    return defaults.page_not_found(request, exception)
