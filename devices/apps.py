"""The Django app of organizations, sensors, devices, tokens and what they measured."""

from __future__ import annotations

from django.apps import AppConfig


class DevicesConfig(AppConfig):
    name = "devices"

    def ready(self) -> None:
        from devices import catalogue, variable_locks

        catalogue.connect_signals()
        variable_locks.connect_signals()
