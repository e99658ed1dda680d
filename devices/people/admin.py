"""The login page of the admin."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.forms import AdminAuthenticationForm
from django.core.exceptions import ValidationError

from devices.people import failures
from devices.people.login import tried


class LoginForm(AdminAuthenticationForm):
    """Closed to whoever failed too often, as the login of the API is."""

    def clean(self) -> dict[str, Any]:
        attempt = tried(self.request, self.cleaned_data.get("username"))
        closed = failures.seconds_closed(attempt)
        if closed:
            raise ValidationError(f"Too many failed logins. Try again in {closed} seconds.", code="throttled")
        try:
            return super().clean()
        except ValidationError:
            failures.count(attempt)
            raise
