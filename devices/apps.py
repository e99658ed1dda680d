"""The Django app of organizations, sensors, devices, tokens and what they measured."""

from __future__ import annotations

from django.apps import AppConfig


class DevicesConfig(AppConfig):
    name = "devices"

    def ready(self) -> None:
        from devices import catalogue, row_locks

        catalogue.connect_signals()
        row_locks.connect_signals()
