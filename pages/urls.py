"""URLs of the pages for growers."""

from __future__ import annotations

from django.urls import path

from pages import views

urlpatterns = [
    path("", views.overview_page, name="home"),
    path("sensors/<uuid:uuid>", views.sensor_page, name="sensor-page"),
]
