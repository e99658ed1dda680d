"""Django settings of every AEMOS process, read from the environment here and nowhere else (docs/configuration.md)."""

from __future__ import annotations

import hashlib
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

from aemos.lib.env import Environment
from aemos.lib.secrets import development_secret
from aemos.logs import process_name
from aemos.openapi.words import DESCRIPTION as API_DESCRIPTION

BASE_DIR = Path(__file__).resolve().parent.parent
ENVIRONMENT = Environment(
    # The earlier name of a setting still works, with a warning.
    renamed={
        "BEHIND_TLS_PROXY": "TLS_IN_FRONT",
        "SOCKETIO_ALLOWED_ORIGINS": "SOCKETIO_ORIGINS",
        "COAP_MAX_AGE_SECONDS": "COAP_MAX_AGE",
        "DATA_COLLECTION_TIMEOUT_MS": "DATA_COLLECTION_TIMEOUT",
        "RULE_CHAIN_TIMEOUT_MS": "RULE_CHAIN_TIMEOUT",
        "WORKER_TIMEOUT_MS": "WORKER_TIMEOUT",
        "RULE_CHAIN_MAX_CONSECUTIVE_FAILURES": "RULE_CHAIN_SUSPEND_AFTER",
    }
)
_env = ENVIRONMENT

AEMOS_ENV = _env.choice("AEMOS_ENV", "development", ("production", "staging", "development", "test"))
VAR_DIR = Path(_env.text("VAR_DIR", str(BASE_DIR / "var")))
DEBUG = _env.flag("DEBUG", default=False)

# Secrets. What is missing stays empty in production, where aemos.checks refuses to start; elsewhere one is made per
# installation, so that the web process and the gateway of one checkout agree on it.
CONFIGURED_SECRET_KEY = _env.secret("SECRET_KEY")
CONFIGURED_JWT_SECRET = _env.secret("JWT_SECRET")
_substitute = "" if AEMOS_ENV == "production" else development_secret(VAR_DIR / "development-secret")
SECRET_KEY = CONFIGURED_SECRET_KEY or (_substitute and f"key-{_substitute}") or "refused-by-the-start-up-check"
JWT_SECRET = CONFIGURED_JWT_SECRET or (_substitute and f"jwt-{_substitute}") or "refused-by-the-start-up-check"
# Device secrets and the HMACs of device tokens hang on this key. It has its own name so that SECRET_KEY can be rotated
# without sending someone to every sensor.
DEVICE_TOKEN_KEY = _env.secret("DEVICE_TOKEN_KEY") or hashlib.sha256(f"device-token:{SECRET_KEY}".encode()).hexdigest()

# Web
PORT = _env.integer("PORT", 3000, minimum=1, maximum=65535)
BIND_HOST = _env.text("BIND_HOST", "127.0.0.1")
WEB_WORKERS = _env.integer("WEB_WORKERS", 1, minimum=1, maximum=64)
ALLOWED_HOSTS = _env.words("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]")
CSRF_TRUSTED_ORIGINS = _env.words("CSRF_TRUSTED_ORIGINS")
# Pages of other servers whose scripts may call the API; none by default. Their requests bring a token, never a cookie.
CORS_ALLOWED_ORIGINS = _env.words("CORS_ALLOWED_ORIGINS")
CORS_URLS_REGEX = r"^/api/"
BEHIND_TLS_PROXY = _env.flag("BEHIND_TLS_PROXY", default=AEMOS_ENV == "production")
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if BEHIND_TLS_PROXY else None
SECURE_SSL_REDIRECT = BEHIND_TLS_PROXY
SECURE_REDIRECT_EXEMPT = [r"^api/v1/health", r"^api/v1/metrics/prometheus$"]  # these come from inside, without TLS
SECURE_HSTS_SECONDS = 31_536_000 if BEHIND_TLS_PROXY else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = BEHIND_TLS_PROXY
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = BEHIND_TLS_PROXY
SESSION_COOKIE_HTTPONLY = True

# Traces go to an OpenTelemetry collector, under the names that OpenTelemetry gives its settings; without one there are none.
OTEL_EXPORTER_OTLP_ENDPOINT = _env.text("OTEL_EXPORTER_OTLP_ENDPOINT")
OTEL_TRACES_SAMPLER_ARG = _env.ratio("OTEL_TRACES_SAMPLER_ARG", 1.0)
PROCESS_NAME = process_name()

ACCESS_LOG = _env.flag("ACCESS_LOG", default=AEMOS_ENV != "test")
LOG_FORMAT = _env.choice("LOG_FORMAT", "json" if AEMOS_ENV in ("production", "staging") else "text", ("json", "text"))
# Who may read metrics and health, and what an orchestrator sees of them
METRICS_TOKEN = _env.secret("METRICS_TOKEN")
METRICS_ALLOWED_NETWORKS = _env.networks("METRICS_ALLOWED_NETWORKS")
READINESS_FAILS_WHEN_OPEN = _env.flag("READINESS_FAILS_WHEN_OPEN", default=False)

# Redis
REDIS_HOST = _env.text("REDIS_HOST", "127.0.0.1")
REDIS_PORT = _env.integer("REDIS_PORT", 6379, minimum=1, maximum=65535)
REDIS_DB = _env.integer("REDIS_DB", 0, maximum=15)
REDIS_USERNAME = _env.text("REDIS_USERNAME")
REDIS_PASSWORD = _env.secret("REDIS_PASSWORD")
REDIS_TLS = _env.flag("REDIS_TLS", default=False)
REDIS_CA_FILE = _env.text("REDIS_CA_FILE")

# Database
DB_ENGINE = _env.choice("DB_ENGINE", "sqlite", ("sqlite", "postgresql"))
_DATABASES: dict[str, dict[str, Any]] = {
    "sqlite": {
        "ENGINE": "django_prometheus.db.backends.sqlite3",
        "NAME": _env.text("DB_NAME", str(VAR_DIR / "aemos.sqlite3")),
        # IMMEDIATE: a transaction that reads first and writes later would otherwise fail at once when another process
        # writes in between, instead of waiting its turn.
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA foreign_keys=ON;",
        },
    },
    "postgresql": {
        "ENGINE": "django_prometheus.db.backends.postgresql",
        "NAME": _env.text("DB_NAME", "aemos"),
        "HOST": _env.text("DB_HOST", "127.0.0.1"),
        "PORT": _env.integer("DB_PORT", 5432, minimum=1, maximum=65535),
        "USER": _env.text("DB_USER", "aemos"),
        "PASSWORD": _env.secret("DB_PASSWORD"),
        # The pool, not CONN_MAX_AGE, shares connections: under gevent a kept connection would belong to one greenlet.
        "CONN_MAX_AGE": 0,
        "OPTIONS": {"pool": {"min_size": 1, "max_size": _env.integer("DB_POOL_SIZE", 10, minimum=1), "timeout": 5}},
    },
}
DATABASES = {"default": _DATABASES[DB_ENGINE]}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Broker and gateway
MQTT_ENABLED = _env.flag("MQTT_ENABLED", default=True)
MQTT_HOST = _env.text("MQTT_HOST", "127.0.0.1")
MQTT_PORT = _env.integer("MQTT_PORT", 1883, minimum=1, maximum=65535)
MQTT_USERNAME = _env.text("MQTT_USERNAME", "aemos-gateway")
MQTT_PASSWORD = _env.secret("MQTT_PASSWORD")
MQTT_TLS = _env.flag("MQTT_TLS", default=False)
MQTT_CA_FILE = _env.text("MQTT_CA_FILE")
MQTT_CERT_FILE = _env.text("MQTT_CERT_FILE")
MQTT_KEY_FILE = _env.text("MQTT_KEY_FILE")
SOCKETIO_HOST = _env.text("SOCKETIO_HOST", "127.0.0.1")
SOCKETIO_PORT = _env.integer("SOCKETIO_PORT", 3001, maximum=65535)
SOCKETIO_URL = _env.text("SOCKETIO_URL").rstrip("/")
SOCKETIO_ALLOWED_ORIGINS = _env.words("SOCKETIO_ALLOWED_ORIGINS")
GATEWAY_NAME = _env.text("GATEWAY_NAME", f"{socket.gethostname()}-{SOCKETIO_PORT}")
COAP_HOST = _env.text("COAP_HOST", "127.0.0.1")
COAP_PORT = _env.integer("COAP_PORT", 5683, maximum=65535)
COAP_MAX_AGE_SECONDS = _env.integer("COAP_MAX_AGE_SECONDS", 60, minimum=10, maximum=86_400)
COAP_REQUESTS_PER_SECOND = _env.integer("COAP_REQUESTS_PER_SECOND", 200, minimum=1, maximum=100_000)

# Events
EVENT_PARTITIONS = _env.integer("EVENT_PARTITIONS", 8, minimum=1, maximum=1024)
ENABLE_BACKPRESSURE = _env.flag("ENABLE_BACKPRESSURE", default=True)
QUEUE_WARNING_THRESHOLD = _env.integer("QUEUE_WARNING_THRESHOLD", 10_000, minimum=1)
QUEUE_CRITICAL_THRESHOLD = _env.integer("QUEUE_CRITICAL_THRESHOLD", 50_000, minimum=1)
QUEUE_RECOVERY_THRESHOLD = _env.integer("QUEUE_RECOVERY_THRESHOLD", 5_000, minimum=1)
DATA_COLLECTION_TIMEOUT_MS = _env.integer("DATA_COLLECTION_TIMEOUT_MS", 5_000, minimum=1)
RULE_CHAIN_TIMEOUT_MS = _env.integer("RULE_CHAIN_TIMEOUT_MS", 30_000, minimum=1)
WORKER_TIMEOUT_MS = _env.integer("WORKER_TIMEOUT_MS", 60_000, minimum=1_000)
RULE_CHAIN_MAX_CONSECUTIVE_FAILURES = _env.integer("RULE_CHAIN_MAX_CONSECUTIVE_FAILURES", 10)
NOTIFICATION_STREAM_LENGTH = _env.integer("NOTIFICATION_STREAM_LENGTH", 100_000, minimum=1_000)
NOTIFICATION_MAX_ATTEMPTS = _env.integer("NOTIFICATION_MAX_ATTEMPTS", 5, minimum=1, maximum=100)
NOTIFICATION_EXPIRY_SECONDS = _env.integer("NOTIFICATION_EXPIRY_SECONDS", 86_400, minimum=10)
CLOCK_TOLERANCE_SECONDS = _env.integer("CLOCK_TOLERANCE_SECONDS", 5, minimum=0)
LATE_AFTER_SECONDS = _env.integer("LATE_AFTER_SECONDS", 600, minimum=1)
MAX_EVENT_AGE_DAYS = _env.integer("MAX_EVENT_AGE_DAYS", 30, minimum=1)
COMMAND_EXPIRY_SECONDS = _env.integer("COMMAND_EXPIRY_SECONDS", 300, minimum=10)
NOTIFICATION_RETENTION_DAYS = _env.integer("NOTIFICATION_RETENTION_DAYS", 30, minimum=1)
REJECTED_RETENTION_DAYS = _env.integer("REJECTED_RETENTION_DAYS", 30, minimum=1)
DEAD_LETTER_RETENTION_DAYS = _env.integer("DEAD_LETTER_RETENTION_DAYS", 90, minimum=1)
AUDIT_RETENTION_DAYS = _env.integer("AUDIT_RETENTION_DAYS", 365)
ALARM_RETENTION_DAYS = _env.integer("ALARM_RETENTION_DAYS", 90, minimum=1)
ALARM_FLAPPING_TIMES = _env.integer("ALARM_FLAPPING_TIMES", 5, minimum=1, maximum=1_000)
ALARM_FLAPPING_SECONDS = _env.integer("ALARM_FLAPPING_SECONDS", 600, minimum=1, maximum=86_400)

INSTALLED_APPS = [
    "aemos.apps.AemosConfig",
    "monitoring.apps.MonitoringConfig",
    "gateway.apps.GatewayConfig",
    "pages.apps.PagesConfig",
    "rules.apps.RulesConfig",
    "notifications.apps.NotificationsConfig",
    "devices.apps.DevicesConfig",
    "rest_framework",
    "rest_framework_simplejwt.token_blacklist",
    "django_otp",
    "django_otp.plugins.otp_totp",
    "django_otp.plugins.otp_static",
    "django_filters",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_rq",
    "corsheaders",
    "django_prometheus",
    "aemos.apps.AdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
]
MIDDLEWARE = [
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    *(["aemos.access_log.access_log"] if ACCESS_LOG or OTEL_EXPORTER_OTLP_ENDPOINT else []),
    "aemos.middleware.security_headers",
    "aemos.middleware.problems_below_api",
    *(["corsheaders.middleware.CorsMiddleware"] if CORS_ALLOWED_ORIGINS else []),
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "devices.people.preferences.personal",
    "devices.audit.notes.audit",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "aemos.middleware.BoundedMetricsMiddleware",
]
ROOT_URLCONF = "aemos.urls"
WSGI_APPLICATION = "aemos.wsgi.application"
APPEND_SLASH = False
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "django.template.context_processors.i18n",
                "devices.people.preferences.for_templates",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LANGUAGE_CODE = "en-us"
# Those that the pages speak; the API, the admin and the logs speak English.
LANGUAGES = [("en", "English"), ("de", "Deutsch")]
TIME_ZONE = "UTC"
USE_TZ = True
STATIC_URL = "static/"
WHITENOISE_ALLOW_ALL_ORIGINS = False
WHITENOISE_USE_FINDERS = True  # serves the admin's files from the packages, so that there is nothing to collect
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_048_576  # 1 MB, the largest request the telemetry endpoint takes
DATA_UPLOAD_MAX_NUMBER_FIELDS = 10_000  # admin actions on a full page of rows

OTP_TOTP_ISSUER = "AEMOS"

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "devices.people.authentication.ApiTokenAuthentication",
        "rest_framework_simplejwt.authentication.JWTAuthentication",
        "rest_framework.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["devices.permissions.MemberPermission"],
    "DEFAULT_PAGINATION_CLASS": "devices.pagination.Pagination",
    "DEFAULT_FILTER_BACKENDS": ["devices.filters.StrictFilterBackend"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["devices.parsers.BoundedJSONParser"],
    "DEFAULT_SCHEMA_CLASS": "aemos.openapi.operations.Schema",
    "EXCEPTION_HANDLER": "aemos.lib.problems.exception_handler",
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SIMPLE_JWT = {
    "ALGORITHM": "HS256",
    "SIGNING_KEY": JWT_SECRET,
    # A refresh token is good for once, and a new password ends every token of its user.
    "ROTATE_REFRESH_TOKENS": True,
    "BLACKLIST_AFTER_ROTATION": True,
    "CHECK_REVOKE_TOKEN": True,
    # Short names: see devices.people.jwt.
    "TOKEN_TYPE_CLAIM": "typ",
    "USER_ID_CLAIM": "sub",
    "REVOKE_TOKEN_CLAIM": "pw",
    "UPDATE_LAST_LOGIN": True,
    "ACCESS_TOKEN_LIFETIME": timedelta(minutes=_env.integer("JWT_ACCESS_MINUTES", 30, minimum=1)),
    "REFRESH_TOKEN_LIFETIME": timedelta(days=_env.integer("JWT_REFRESH_DAYS", 7, minimum=1)),
}
SPECTACULAR_SETTINGS = {
    "TITLE": "AEMOS",
    "DESCRIPTION": API_DESCRIPTION,
    "VERSION": "1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "COMPONENT_SPLIT_REQUEST": True,  # so that clients which are generated need not send what only answers have
    "ENUM_NAME_OVERRIDES": {"ProtocolEnum": "notifications.models.PROTOCOL_CHOICES"},
    "POSTPROCESSING_HOOKS": [
        "drf_spectacular.hooks.postprocess_schema_enums",
        "aemos.openapi.operations.add_errors",
        "aemos.openapi.telemetry.add_telemetry",
        "aemos.openapi.operations.add_words",
        "aemos.openapi.examples.add_examples",
    ],
}

# RQ: one queue per lane, in this order. The functions that a job may name are listed in rules.journal.tickets.
RQ = {
    "WORKER_CLASS": "rules.worker.DrainWorker",
    "JOB_CLASS": "rules.journal.tickets.AllowedJob",
    "COMMIT_MODE": "auto",
}
LANES = ("critical", "normal", "low")
RQ_QUEUES = {
    lane: {
        "HOST": REDIS_HOST,
        "PORT": REDIS_PORT,
        "DB": REDIS_DB,
        "USERNAME": REDIS_USERNAME or None,
        "PASSWORD": REDIS_PASSWORD or None,
        "SSL": REDIS_TLS,
        "SSL_CERT_REQS": "required",
        "REDIS_CLIENT_KWARGS": {"ssl_ca_certs": REDIS_CA_FILE or None} if REDIS_TLS else {},
        "DEFAULT_TIMEOUT": 60,
    }
    for lane in LANES
}

LOG_LEVEL = _env.choice("LOG_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR"))
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"()": "aemos.logs.formatter", "kind": LOG_FORMAT}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": LOG_LEVEL},
    "loggers": {"rq.worker": {"level": "WARNING"}, "django.request": {"level": "ERROR"}},
}
