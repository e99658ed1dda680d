"""URLs of the pages for growers."""

from __future__ import annotations

from django.urls import path

from pages import views
from pages.rules import views as rules

urlpatterns = [
    path("", views.overview_page, name="home"),
    path("sensors/<uuid:uuid>", views.sensor_page, name="sensor-page"),
    path("rules", rules.list_page, name="rules-page"),
    path("rules/new", rules.new_page, name="new-rule-page"),
    path("rules/preview", rules.preview, name="rule-preview"),
    path("rules/<uuid:uuid>", rules.rule_page, name="rule-page"),
    path("rules/<uuid:uuid>/edit", rules.edit_page, name="edit-rule-page"),
    path("rules/<uuid:uuid>/switch", rules.switch, name="switch-rule"),
    path("rules/<uuid:uuid>/delete", rules.delete, name="delete-rule"),
]
