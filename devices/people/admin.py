"""Who may enter the admin, and its login page."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.forms import AuthenticationForm
from django.core.exceptions import ValidationError
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy as lazy

from devices.models import Membership
from devices.people import failures, second_factor
from devices.people.login import tried


class LoginForm(AdminAuthenticationForm):
    """Closed to whoever failed too often, as the login of the API is."""

    otp = forms.CharField(
        required=False,
        label=lazy("Code, if you use a second factor"),
        widget=forms.TextInput(attrs={"inputmode": "numeric", "autocomplete": "one-time-code"}),
    )

    def clean(self) -> dict[str, Any]:
        attempt = tried(self.request, self.cleaned_data.get("username"))
        closed = failures.seconds_closed(attempt)
        if closed:
            text = _("Too many failed logins. Try again in {seconds} seconds.")
            raise ValidationError(text.format(seconds=closed), code="throttled")
        try:
            cleaned = super().clean()
            self._check_second_factor()
            return cleaned
        except ValidationError:
            failures.count(attempt)
            raise

    def _check_second_factor(self) -> None:
        user, code = self.user_cache, self.cleaned_data.get("otp") or ""
        if user is not None and second_factor.is_on(user) and not (code and second_factor.accepts(user, code)):
            raise ValidationError(
                _("The code is missing, wrong or used: take the newest of your app."), code="second-factor"
            )

    def confirm_login_allowed(self, user: Any) -> None:
        AuthenticationForm.confirm_login_allowed(self, user)
        if not may_enter(user):
            raise ValidationError(
                _("You belong to no organization yet: ask its admin to add you."), code="no-organization"
            )


def may_enter(user: Any) -> bool:
    """Whoever has a role in an organization: what it allows is what its pages show. Superusers; and staff, for RQ's pages."""
    if not user.is_active:
        return False
    return bool(user.is_superuser or user.is_staff) or Membership.objects.filter(user_id=user.pk).exists()
