"""URLs of what watches the system, below /api/v1/."""

from __future__ import annotations

from django.urls import path

from monitoring import health, views

urlpatterns = [
    path("health", views.HealthView.as_view(), name="health"),
    path("health/liveness", health.liveness, name="liveness"),
    path("health/readiness", health.readiness, name="readiness"),
    path("metrics/queue", views.QueueView.as_view(), name="metrics-queue"),
    path("metrics/queue/summary", views.SummaryView.as_view(), name="metrics-queue-summary"),
    path("metrics/prometheus", views.PrometheusView.as_view(), name="metrics-prometheus"),
    path("metrics/backpressure/reset", views.ResetView.as_view(), name="backpressure-reset"),
]
