"""URLs of the notifications part of the REST API, under /api/v1/."""

from __future__ import annotations

from rest_framework.routers import SimpleRouter

from notifications import views

router = SimpleRouter(trailing_slash=False, use_regex_path=False)
router.register("notifications", views.NotificationViewSet)

urlpatterns = router.urls
