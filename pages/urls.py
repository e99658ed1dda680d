"""URLs of the pages for growers."""

from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.urls import path
from django.views.decorators.cache import cache_control
from django.views.i18n import JavaScriptCatalog

from pages import areas, live, views
from pages.operations import views as operations
from pages.people import members, preferences
from pages.rules import views as rules
from pages.setup import views as setup

# What scripts say, in the language of the page, which names it so that a cache keeps languages apart.
texts = cache_control(private=True, max_age=3_600)(
    login_required(login_url="admin:login")(JavaScriptCatalog.as_view(packages=["pages"]))
)

urlpatterns = [
    path("", views.overview_page, name="home"),
    path("texts.js", texts, name="texts"),
    path("account/preferences", preferences.preferences_page, name="preferences"),
    path("live", live.live_token, name="live-token"),
    path("farms/new", setup.new_farm, name="new-farm-page"),
    path("sensors/new", setup.new_sensor, name="new-sensor-page"),
    path("devices/new", setup.new_device, name="new-device-page"),
    path("sensors/<uuid:uuid>/connect", setup.connect_sensor, name="connect-sensor-page"),
    path("devices/<uuid:uuid>/connect", setup.connect_device, name="connect-device-page"),
    path("sensors/<uuid:uuid>", views.sensor_page, name="sensor-page"),
    path("sensors/<uuid:uuid>/target", views.set_target, name="set-target"),
    path("sensors/<uuid:uuid>/marks", views.marks_of_sensor, name="sensor-marks"),
    path("devices/<uuid:uuid>", views.device_page, name="device-page"),
    path("areas", areas.areas_page, name="areas-page"),
    path("areas/<uuid:uuid>/delete", areas.delete_area, name="delete-area"),
    path("sensors/<uuid:uuid>/area", areas.put_sensor, name="put-sensor"),
    path("devices/<uuid:uuid>/area", areas.put_device, name="put-device"),
    path("people", members.people_page, name="people-page"),
    path("people/invitations/<uuid:uuid>/withdraw", members.withdraw, name="withdraw-invitation"),
    path("people/<uuid:uuid>/<int:user>/change", members.change_member, name="change-member"),
    path("people/<uuid:uuid>/<int:user>/remove", members.remove_member, name="remove-member"),
    path("operations", operations.operations_page, name="operations-page"),
    path("operations/circuit", operations.set_circuit, name="set-circuit"),
    path("operations/lane", operations.set_lane, name="set-lane"),
    path("rules", rules.list_page, name="rules-page"),
    path("rules/new", rules.new_page, name="new-rule-page"),
    path("rules/preview", rules.preview, name="rule-preview"),
    path("rules/<uuid:uuid>", rules.rule_page, name="rule-page"),
    path("rules/<uuid:uuid>/edit", rules.edit_page, name="edit-rule-page"),
    path("rules/<uuid:uuid>/switch", rules.switch, name="switch-rule"),
    path("rules/<uuid:uuid>/delete", rules.delete, name="delete-rule"),
]
