"""The site of the admin: open to whoever has a role in an organization, to staff, and to superusers."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest

from devices.people.admin import LoginForm, may_enter


class AdminSite(admin.AdminSite):
    site_header = site_title = "AEMOS"
    login_form = LoginForm

    def has_permission(self, request: HttpRequest) -> bool:
        return may_enter(request.user)
