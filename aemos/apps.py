"""The Django app of the composition root: whatever starts Django starts here, and stops here when the settings are unsafe."""

from __future__ import annotations

import logging

from django.apps import AppConfig
from django.contrib.admin.apps import AdminConfig as DjangoAdminConfig

log = logging.getLogger(__name__)


class AemosConfig(AppConfig):
    name = "aemos"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from aemos import checks

        checks.refuse_unsafe_settings()
        for warning in checks.earlier_names():
            log.warning("%s: %s", warning.id, warning.msg)


class AdminConfig(DjangoAdminConfig):
    default_site = "aemos.admin.AdminSite"
